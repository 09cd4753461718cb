#!/bin/sh
# Hosts of one compose service share a volume. This gives each container a folder of its own there, the first that no
# other holds, as /tmp/state, and then becomes the command. The lock ends with the process, however that ends.
set -eu
n=1
while :; do
  folder=/kilohive/state/$n
  mkdir -p "$folder"
  exec 9>"$folder/lock"
  if flock -n 9; then break; fi
  n=$((n + 1))
done
ln -sfn "$folder" /tmp/state
exec "$@"
