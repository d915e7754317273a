#!/usr/bin/env bash
# Apptainer where it is not installed, in a small Debian of its own: containers/apptainer.sh ARGUMENTS.
# Needs root, debootstrap and 400 MB at APPTAINER_ROOT. Shares this checkout and /tmp; runs as an ordinary user.
set -euo pipefail
root=${APPTAINER_ROOT:-/var/tmp/bids_uad-apptainer}
if [ ! -x "$root/usr/bin/apptainer" ]; then
    debootstrap --variant=minbase --include=apptainer,ca-certificates sid "$root" >&2
fi
touch "$root/etc/hosts"
grep -q '^user:' "$root/etc/passwd" || echo 'user:x:1000:1000::/tmp:/bin/sh' >>"$root/etc/passwd"
grep -q '^user:' "$root/etc/group" || echo 'user:x:1000:' >>"$root/etc/group"
checkout=$(cd "$(dirname "$0")/.." && pwd)

# pivot_root, and no chroot, since the kernel gives chrooted processes no user namespaces.
exec unshare --mount --pid --fork bash -c '
    set -euo pipefail
    root=$1 checkout=$2
    shift 2
    mount --bind "$root" "$root"
    mount -t proc proc "$root/proc"
    mount --rbind /dev "$root/dev"
    mount --rbind /sys "$root/sys"
    mount --bind /tmp "$root/tmp"
    mkdir -p "$root$checkout" "$root/old"
    mount --bind "$checkout" "$root$checkout"
    cd "$root"
    pivot_root . old
    umount --lazy /old
    cd "$checkout"
    exec setpriv --reuid=1000 --regid=1000 --clear-groups env -i PATH=/usr/bin:/bin:/usr/sbin HOME=/tmp USER=user \
        APPTAINER_TMPDIR=/tmp APPTAINER_CACHEDIR=/tmp/bids_uad-apptainer-cache apptainer "$@"
' apptainer "$root" "$checkout" "$@"
