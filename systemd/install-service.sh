#!/bin/sh
# As root: makes a service of a bridged that was installed by pip. Where it is, is where this script is:
#
#   python3 -m venv /opt/bridged && /opt/bridged/bin/pip install bridged
#   sudo /opt/bridged/share/bridged/install-service.sh
#
# Unit and sockets, the user, device rules, folders, the journal's catalogue, and a configuration without targets unless there
# is one. Repeating it after an upgrade is how the new unit gets into place. `--root DIR`: into another system's tree, and then
# nothing is reloaded. (The Debian package does all this by itself.)
set -eu

root=
[ "${1:-}" = --root ] && root=$2
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
prefix=${BRIDGED_PREFIX:-$(dirname -- "$(dirname -- "$here")")}
case "$prefix" in
/home/* | /root/*)
	echo "bridged is in $prefix, and the service may not look into home directories (ProtectHome=yes)." >&2
	echo "Install it elsewhere: sudo python3 -m venv /opt/bridged && sudo /opt/bridged/bin/pip install bridged" >&2
	exit 1
	;;
esac
[ -x "$prefix/bin/bridged" ] || { echo "$prefix/bin/bridged is missing" >&2; exit 1; }
units=$here
[ -d "$here/systemd" ] && units=$here/systemd

put() { install -D -m 644 "$units/$1" "$root$2"; }

for unit in bridged.service bridged.socket bridged-http.socket bridged-console@.socket; do
	put $unit /etc/systemd/system/$unit
done
sed -i "s|/opt/bridged/|$prefix/|" "$root/etc/systemd/system/bridged.service"
put bridged.tmpfiles /etc/tmpfiles.d/bridged.conf
put bridged.sysusers /etc/sysusers.d/bridged.conf
put bridged.catalog /usr/local/lib/systemd/catalog/bridged.catalog
put 60-bridged.rules /etc/udev/rules.d/60-bridged.rules
put bridged.modules /etc/modules-load.d/bridged.conf
[ -e "$root/etc/bridged/bridged.toml" ] || put bridged.toml /etc/bridged/bridged.toml
if [ ! -e "$root/usr/local/bin/bridged" ]; then
	mkdir -p "$root/usr/local/bin"
	ln -s "$prefix/bin/bridged" "$root/usr/local/bin/bridged"
fi

[ -z "$root" ] || exit 0
systemd-sysusers bridged.conf
systemd-tmpfiles --create bridged.conf
if [ -d /run/systemd/system ]; then
	udevadm control --reload && udevadm trigger --subsystem-match=gpio --subsystem-match=usb-serial || true
	modprobe -aq usbserial cdc_acm || true # as modules-load.d does at the next boot
	journalctl --update-catalog || true
	systemctl daemon-reload
fi
echo "Installed. Next: sudo bridged init, then sudo systemctl enable --now bridged (after an upgrade: restart bridged)."
