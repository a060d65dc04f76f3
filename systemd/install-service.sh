#!/bin/sh
# As root: makes a service of a bridged that was installed by pip. Where it is, is where this script is:
#
#   python3 -m venv /opt/bridged && /opt/bridged/bin/pip install bridged
#   sudo /opt/bridged/share/bridged/install-service.sh
#
# Unit and sockets, the user, device rules, folders, the journal's catalogue, and a configuration without targets unless there
# is one. Repeating it after an upgrade is how the new unit gets into place. Device rules of your own go into
# /etc/udev/rules.d/61-bridged-local.rules; what you have added to 60-bridged.rules is moved there. `--root DIR`: into another system's tree, and then
# nothing is reloaded. `--remove`: takes all of it away again, but not the configuration, the state and the environment itself.
# (The Debian package does all this by itself.)
set -eu

root= remove=
while [ $# -gt 0 ]; do
	case "$1" in
	--root) root=$2 && shift ;;
	--remove) remove=yes ;;
	*) sed -n '2,/^set /{s/^# \{0,1\}//;/^set /d;p;}' "$0" >&2 && exit 2 ;;
	esac
	shift
done
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

put() { if [ "$remove" ]; then rm -f "$root$2"; else install -D -m 644 "$units/$1" "$root$2"; fi; }
# The rules that we install may hold some of yours, from the time when they had no file of their own.
save_rules() {
	ours=$units/60-bridged.rules installed=$root/etc/udev/rules.d/60-bridged.rules
	yours=$root/etc/udev/rules.d/61-bridged-local.rules
	[ -e "$installed" ] && ! cmp -s "$ours" "$installed" || return 0
	cp -p --backup=numbered "$installed" "$installed.bak"
	echo "$installed was another version, or changed by you: kept as $installed.bak"
	added=$(grep -v '^[[:space:]]*\(#\|$\)' "$installed" | grep -Fvx -f "$ours" || true)
	[ ! -e "$yours" ] || added=$(printf '%s\n' "$added" | grep -Fvx -f "$yours" || true)
	if [ "$added" ] && [ -z "$remove" ]; then
		printf '%s\n' "$added" >>"$yours"
		echo "and what it had of its own is in $yours"
	fi
}
link() {
	if [ "$remove" ]; then
		[ ! -L "$root$2" ] || [ "$(readlink "$root$2")" != "$1" ] || rm "$root$2"
	elif [ -e "$1" ] && [ ! -e "$root$2" ]; then
		mkdir -p "$(dirname "$root$2")"
		ln -sf "$1" "$root$2"
	fi
}

if [ "$remove" ] && [ -z "$root" ] && [ -d /run/systemd/system ]; then
	# In order: a running job finishes the command it is in. It goes on if bridged is installed again.
	systemctl stop 'bridged*.socket' bridged.service || true
	systemctl disable bridged.service bridged.socket bridged-http.socket bridged-console@.socket || true
fi
for unit in bridged.service bridged.socket bridged-http.socket bridged-console@.socket; do
	put $unit /etc/systemd/system/$unit
done
[ "$remove" ] || sed -i "s|/opt/bridged/|$prefix/|" "$root/etc/systemd/system/bridged.service"
put bridged.tmpfiles /etc/tmpfiles.d/bridged.conf
put bridged.sysusers /etc/sysusers.d/bridged.conf
put bridged.catalog /usr/local/lib/systemd/catalog/bridged.catalog
save_rules
put 60-bridged.rules /etc/udev/rules.d/60-bridged.rules
put bridged.modules /etc/modules-load.d/bridged.conf
[ "$remove" ] || [ -e "$root/etc/bridged/bridged.toml" ] || put bridged.toml /etc/bridged/bridged.toml
# Where shells and man look.
link "$prefix/bin/bridged" /usr/local/bin/bridged
for file in man/man1/bridged.1 man/man5/bridged.toml.5 bash-completion/completions/bridged zsh/site-functions/_bridged; do
	link "$prefix/share/$file" "/usr/local/share/$file"
done

[ -z "$root" ] || exit 0
if [ "$remove" ]; then
	[ ! -d /run/systemd/system ] || systemctl daemon-reload
	echo "Removed. Left: $prefix, /etc/bridged, /var/lib/bridged, /var/log/bridged, and the user bridged."
	exit 0
fi
systemd-sysusers bridged.conf
systemd-tmpfiles --create bridged.conf
if [ -d /run/systemd/system ]; then
	udevadm control --reload && udevadm trigger --subsystem-match=gpio --subsystem-match=usb-serial || true
	modprobe -aq usbserial cdc_acm || true # as modules-load.d does at the next boot
	journalctl --update-catalog || true
	systemctl daemon-reload
fi
echo "Installed. Next: sudo bridged init, then sudo systemctl enable --now bridged (after an upgrade: restart bridged)."
