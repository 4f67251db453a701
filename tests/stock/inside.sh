#!/bin/bash
# The emulated machine's side of `make test-stock`: run by root with its file system still
# that of virtme-ng, with the host's files at /run/host. Arguments: the checkout, and the
# folder with the kernel's modules.
#
# All it needs is put under a new root: the host's files as a cached read-only view, with
# memory over them for what the tests write. pytest's output and exit status go to the
# folder that is shared with the host.
set -eu
checkout=$1 modules=$2

mount -t tmpfs memory /mnt
mkdir /mnt/{written,work,root}
mount -t overlay -o lowerdir=/run/host,upperdir=/mnt/written,workdir=/mnt/work root /mnt/root
cd /mnt/root
for folder in proc sys dev; do mount --rbind /$folder $folder; done
mount -t tmpfs run run
mkdir -p run/exchange run/old lib/modules
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000 exchange run/exchange
mount --bind "${modules#/}" lib/modules
mount --make-rprivate /
pivot_root . run/old
umount -l /run/old
cd "$checkout"

# itm queues natively here; some tests ask for the other form of these rules, too, and its
# module is the only one that the kernel does not load by itself (for an inet table).
modprobe xt_NFQUEUE

mapfile -t arguments < /run/exchange/arguments
# CI: what needs root or a part of the kernel fails where it is missing, it does not skip.
export HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin CI=1 ITM_PATIENCE=10
ITM_SHARE=$(< /run/exchange/share)
export ITM_SHARE
set +e
.venv/bin/python -m pytest "${arguments[@]}" > /run/exchange/output 2>&1
echo $? > /run/exchange/status
