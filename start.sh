#!/bin/sh
# Build ./pontoon and become it: the Procfile starts every node through here.
#
# The nodes start at once, and with `go run .` each would compile everything on
# a cold build cache. So they take turns: the first compiles, the others find
# nothing left to do. exec, so that signals and the exit code are the server's
# own and not those of a shell or of the go command around it.
#
# The lock is a symbolic link to the holder's process id: it appears in one step
# and works on every Unix, which flock(1) does not. It only saves work, so a
# dead holder is ignored and nobody waits for it longer than five minutes.
set -eu
cd "$(dirname "$0")"
lock=.build.lock
turns=1500 # of 0.2 s

until ln -s $$ $lock 2>/dev/null || [ $turns -eq 0 ]; do
	holder=$(readlink $lock || true) # empty: released this very moment
	[ -n "$holder" ] && ! kill -0 "$holder" 2>/dev/null && rm -f $lock
	turns=$((turns - 1))
	sleep 0.2
done
trap 'rm -f $lock' EXIT
trap 'exit 1' HUP INT TERM

[ -x pontoon ] || echo 'building pontoon: about half a minute on a new machine'
go build -o pontoon .
rm -f $lock
export PONTOON_LOG_FORMAT="${PONTOON_LOG_FORMAT:-console}" # goreman is read by people
exec ./pontoon "$@"
