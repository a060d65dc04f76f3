#!/bin/bash
# bridged on a bare Raspberry Pi (or any Debian 12 or newer), from a checkout of the project:
#
#   sudo ./install.sh              everything below
#   sudo ./install.sh --no-uart    leaves the boot configuration alone (USB adapters, other boards)
#   sudo ./install.sh --uart-only  only the boot configuration
#
# What it does, and nothing else; doing it again changes nothing:
#   1. apt: python3-venv, if it is missing
#   2. a Python environment in /opt/bridged with bridged and its locked dependencies (hashes checked)
#   3. the service: systemd/install-service.sh
#   4. on a Raspberry Pi: a PL011 on pins 8 and 10 (config.txt), no console and no login prompt there (cmdline.txt, getty).
#      Bluetooth is off then on all but the Pi 5. A file that changes is kept once as FILE.before-bridged.
# Then: reboot, `sudo bridged init`, `sudo systemctl enable --now bridged`.
#
# --prefix DIR: instead of /opt/bridged. --root DIR --model TEXT: another system's tree (with --uart-only).
set -euo pipefail
cd "$(dirname "$0")"

prefix=/opt/bridged root="" model="" service=yes uart=yes
while [ $# -gt 0 ]; do
	case "$1" in
	--no-uart) uart=no ;;
	--uart-only) service=no ;;
	--prefix) prefix=$2 && shift ;;
	--root) root=$2 && shift ;;
	--model) model=$2 && shift ;;
	*) sed -n '2,/^set /{s/^# \{0,1\}//;/^set /d;p}' "$0" >&2 && exit 2 ;;
	esac
	shift
done

install_service() {
	python=${PYTHON:-python3}
	if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
		echo "Python 3.11 or newer is needed (Debian 12, Raspberry Pi OS 12); this is $("$python" -V)" >&2
		exit 1
	fi
	if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
		apt-get install -y --no-install-recommends python3-venv || { apt-get update && apt-get install -y --no-install-recommends python3-venv; }
	fi
	"$python" -m venv "$prefix"
	"$prefix/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	"$prefix/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation .
	"$prefix/share/bridged/install-service.sh"
}

# keep FILE: as it was before the first change.
keep() { [ -e "$1.before-bridged" ] || cp -p "$1" "$1.before-bridged"; }

free_uart() {
	[ -n "$model" ] || model=$(tr -d '\0' </proc/device-tree/model 2>/dev/null || true)
	case "$model" in
	"Raspberry Pi 5"*) lines=("dtparam=uart0=on") ;;
	"Raspberry Pi 3"* | "Raspberry Pi 4"* | "Raspberry Pi Zero 2 W"*) lines=("enable_uart=1" "dtoverlay=disable-bt") ;;
	*)
		echo "${model:-This machine} is no Raspberry Pi 3, 4, 5 or Zero 2 W: its serial ports are as they were."
		return
		;;
	esac
	boot=$root/boot/firmware
	[ -e "$boot/config.txt" ] || boot=$root/boot
	changed=no
	for line in "${lines[@]}"; do
		if ! grep -qxF "$line" "$boot/config.txt"; then
			keep "$boot/config.txt"
			# [all]: whatever filter the file ended with does not hold for it.
			grep -qxF "# for bridged" "$boot/config.txt" || printf '\n[all]\n# for bridged\n' >>"$boot/config.txt"
			echo "$line" >>"$boot/config.txt"
			changed=yes
		fi
	done
	# serial0, ttyAMA0 and ttyS0 are all the header's UART, before or after the change above.
	if grep -qE '(^| )console=(serial0|ttyAMA0|ttyS0)\b' "$boot/cmdline.txt"; then
		keep "$boot/cmdline.txt"
		sed -i -E 's/(^| )console=(serial0|ttyAMA0|ttyS0)[^ ]*/\1/g; s/  +/ /g; s/^ //' "$boot/cmdline.txt"
		changed=yes
	fi
	if [ -z "$root" ]; then
		systemctl mask --now serial-getty@ttyAMA0.service serial-getty@ttyS0.service >/dev/null 2>&1 || true
		# It would try to talk to the Bluetooth chip over the port; not there on newer systems.
		systemctl disable --now hciuart.service >/dev/null 2>&1 || true
	fi
	echo "$model: the UART on pins 8 and 10 is for the target as /dev/ttyAMA0$([ $changed = no ] || echo ', after a reboot')."
}

[ -n "$root" ] || [ "$(id -u)" = 0 ] || { echo "sudo is needed" >&2; exit 1; }
[ $service = no ] || install_service
[ $uart = no ] || free_uart
