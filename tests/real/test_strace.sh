#!/usr/bin/env bash
#
# System calls that fail for real; prints TAP.
#
# strace lets the Nth call of a kind fail, or kills the process in it, for
# every N until a run has no Nth call. tests/real/worker.c does the work, and
# afterwards compares what the store holds with what was acknowledged. The
# kinds are all calls of the worker that change a file, and those that read;
# opens fail for want of a descriptor, too.
#
#   life       a store from its creation to its close, several opens
#   recovery   what a kill has left is opened, written to and closed
#   threads    a life with the background thread
#
#   --scale N           0: no reads; N > 1: N rounds, threads, ENOSPC, and errors
#                       that stay
#   --only S:E:C:N      one run: scenario, effect, call, number, such as
#                       life:EIO:fdatasync:3; the directory is kept
#
# Where strace is missing or may not trace, everything is skipped, and said
# so.
#
# SPDX-License-Identifier: MIT

set -u
cd "$(dirname "$0")/../.." || exit 1
export LC_ALL=C

scale=1
only=
while [ $# -gt 0 ]; do
    case $1 in
    --scale) scale=${2:?--scale needs a number} ;;
    --only)  only=${2:?--only needs S:E:C:N} ;;
    *)       echo "usage: $0 [--scale N] [--only S:E:C:N]" >&2; exit 2 ;;
    esac
    shift 2
done
rounds=$((scale > 1 ? scale : 1))
worker=$PWD/${BUILD:-build}/tests/real_worker
case ${BUILD:-build} in /*) worker=$BUILD/tests/real_worker ;; esac

# Some thousand stores are synced, and no power fails: memory will do.
tmp=${TMPDIR:-/tmp}
[ -w /dev/shm ] && tmp=/dev/shm
scratch=$(mktemp -d "$tmp/kvmeta-strace.XXXXXX") || exit 1
trap 'rm -rf "$scratch"' EXIT
dir=$scratch/store
log=$scratch/log
trace=$scratch/trace

# --------------------------------------------------------------------------
# May we?
# --------------------------------------------------------------------------

skip_all() {
    echo "ok 1 - system_calls_fail_for_real # SKIP $1"
    echo "# SKIPPED: $1: no system call was made to fail"
    echo "1..1"
    exit 0
}

command -v strace >/dev/null || skip_all "strace is not installed"
strace -f -o "$trace" -e trace=close -e inject=close:error=EIO:when=9999 \
    true >"$scratch/why" 2>&1 </dev/null ||
    skip_all "strace may not trace here: $(head -n 1 "$scratch/why")"
if [ ! -x "$worker" ]; then
    echo "not ok 1 - there is no $worker: make tests"
    echo "1..1"
    exit 1
fi

# --------------------------------------------------------------------------
# One run
# --------------------------------------------------------------------------

thread=0
work() { # mode, more arguments ...
    "$worker" --dir "$dir" --log "$log" --rounds "$rounds" \
        --thread "$thread" --mode "$@" </dev/null
}

# Prepares what a scenario begins with: nothing, or what a kill has left.
begin() { # scenario
    rm -rf "$dir" "$log" "$trace"
    thread=0
    case $1 in
    threads) thread=1 ;;
    recovery)
        if [ ! -d "$scratch/killed" ]; then
            { work live --kill-at 9; } 2>/dev/null
            cp -R "$dir" "$scratch/killed"
            cp "$log" "$scratch/killed.log"
        fi
        rm -rf "$dir"
        cp -R "$scratch/killed" "$dir"
        cp "$scratch/killed.log" "$log"
        ;;
    esac
}

# Without other threads: no step of the worker may note success in which a
# frame was not written, or a log with frames not synced. (A log that is only
# being prepared may fail: another one takes its place.)
success_was_true() {
    awk '{
            name = ""
            if (match($0, /w[0-9a-f]+\.wal/))
                name = substr($0, RSTART, RLENGTH)
         }
         /pwrite.*\.wal>, "Kvf/ { framed[name] = 1 }
         name in framed && /(pwrite.*"Kvf|fdatasync).*INJECTED/ { hit = 1 }
         / write\(.*"(ack 0|barrier)/ && hit { bad = 1 }
         / write\(.*"(ack|barrier|error|found)/ { hit = 0; seen = 1 }
         END { exit bad || !seen }' "$trace"
}

# The worker under strace, its Nth call failing. 0: it did what it should;
# 1: it did not; 2: there is no Nth call.
run_one() { # scenario, effect, call, N
    local how errno=0 status expected=0 calls=$3
    case $2 in
    KILL)    how=signal=KILL expected=137 ;;
    EIO*)    how=error=EIO errno=5 ;;
    ENOSPC*) how=error=ENOSPC errno=28 ;;
    EMFILE)  how=error=EMFILE errno=24 ;;
    esac
    case $2 in *+) how=$how:when=$4+ ;; *) how=$how:when=$4 ;; esac
    case $3 in pwrite* | fdatasync) calls=write,pwrite64,fdatasync,$3 ;; esac
    begin "$1"
    {   # so that bash does not tell of each kill
        strace -f -y -qq -o "$trace" -e signal=none \
            -e "trace=$calls" -e "inject=$3:$how" "$worker" --dir "$dir" --log "$log" \
            --rounds "$rounds" --thread "$thread" --mode live \
            --error "$errno" </dev/null >"$scratch/out" 2>&1
    } 2>/dev/null
    status=$?
    if [ "$2" = KILL ]; then
        [ $status = 0 ] && return 2
    else
        grep -q INJECTED "$trace" || return 2
    fi
    [ $status = $expected ] || { why="exit status $status"; return 1; }
    grep '^bad' "$log" >"$scratch/out" && { why=bad; return 1; }
    case $1:$2:$3 in
    threads:* | *:KILL:*) ;;
    *:pwrite* | *:fdatasync)
        success_was_true || { why="success, though a log failed"; return 1; }
    esac
    grep -q '^error write -10' "$log" && refused=$((refused + 1))
    thread=0
    work verify >"$scratch/out" 2>&1 || { why="verify: $?"; return 1; }
}

# --------------------------------------------------------------------------
# All of them
# --------------------------------------------------------------------------

count=0
bad=0

failed() { # scenario:effect:call:N
    echo "# $1: $why"
    (cat "$scratch/out"; tail -n 8 "$log"; tail -n 3 "$trace") 2>/dev/null |
        sed 's/^/#   /'
    echo "replay: tests/real/test_strace.sh --scale $scale --only $1"
}

# A log that could not be written or synced ends the writing.
must_refuse() { # scenario:effect:call
    case $1 in life:EIO:pwrite* | life:EIO:fdatasync) return 0 ;; esac
    return 1
}

# Every N for one call. The calls of the worker before its mark are left out:
# they load it.
every() { # scenario, effect, call
    local n first calls faults=0 wrong=0
    refused=0
    calls=$(sed '1,/^begins$/d' "$scratch/calls.$1" | grep -c "^$3\$")
    first=$(grep -n begins "$scratch/calls.$1" | head -n 1 | cut -d: -f1)
    first=$(head -n "$first" "$scratch/calls.$1" | grep -c "^$3\$")
    for ((n = first + 1; ; n++)); do
        run_one "$1" "$2" "$3" $n
        case $? in
        0) ;;
        1) wrong=1; failed "$1:$2:$3:$n" ;;
        2) break ;;
        esac
        faults=$((faults + 1))
        [ $wrong = 0 ] || break
    done
    count=$((count + 1))
    total=$((total + faults))
    told=$((told + refused))
    if [ $wrong = 1 ]; then
        echo "not ok $count - ${1}_with_${2}_at_every_$3"
        bad=1
    elif [ $faults = 0 ] ||
            { [ $faults != "$calls" ] && [ "$1" != threads ]; }; then
        echo "not ok $count - ${1}_with_${2}_at_every_$3: of $calls calls" \
            "$faults failed"
        bad=1
    elif must_refuse "$1:$2:$3" && [ $refused = 0 ]; then
        echo "not ok $count - ${1}_with_${2}_at_every_$3: no handle refused" \
            "to write after it"
        bad=1
    else
        echo "ok $count - ${1}_with_${2}_at_every_$3"
    fi
}

# Which calls a scenario makes, in order, and a line "begins" at the mark.
list_calls() { # scenario
    begin "$1"
    strace -f -qq -o "$trace" -e signal=none "$worker" --dir "$dir" \
        --log "$log" --rounds "$rounds" --thread "$thread" --mode live \
        </dev/null >"$scratch/out" 2>&1 || {
        echo "not ok 1 - the worker runs without a fault"
        sed 's/^/# /' "$scratch/out"
        tail -n 5 "$log" | sed 's/^/# /'
        echo "1..1"
        exit 1
    }
    sed -E 's/^[0-9]+ +//' "$trace" | awk -F'(' '
        /worker-begins/ { print $1; print "begins"; next }
        /^[a-z0-9_]+\(/ { print $1 }' >"$scratch/calls.$1"
}

# Of these, the ones that change files, read or open them: after the mark.
calls_of() { # scenario, changing | reading | opening
    local pattern
    case $2 in
    changing) pattern='^(pwrite|f(data)?sync|sync_|f?truncate|fallocate|rename'
              pattern=$pattern'|unlink|link|symlink|mkdir|rmdir|open|creat)' ;;
    opening)  pattern='^open' ;;
    reading)  pattern='^(pread|getdents|flock|newfstatat|fstat|statx)' ;;
    esac
    sed '1,/^begins$/d' "$scratch/calls.$1" | sort -u | grep -E "$pattern"
}

if [ -n "$only" ]; then
    IFS=: read -r scenario effect call number <<<"$only"
    refused=0 why=
    run_one "$scenario" "$effect" "$call" "$number"
    status=$?
    trap - EXIT
    [ $status = 1 ] && failed "$only"
    echo "result $status (2: there is no such call); kept: $scratch"
    exit $status
fi

scenarios='life recovery'
effects='EIO KILL'
if [ "$scale" -gt 1 ]; then
    scenarios='life recovery threads'
    effects='EIO KILL EIO+ ENOSPC ENOSPC+'
fi
for scenario in $scenarios; do
    list_calls "$scenario"
    for effect in $effects; do
        total=0 told=0
        for call in $(calls_of "$scenario" changing); do
            every "$scenario" "$effect" "$call"
        done
        [ "$effect" = EIO ] && [ "$scale" != 0 ] && for call in $(calls_of "$scenario" reading); do
            every "$scenario" "$effect" "$call"
        done
        echo "# $scenario, $effect: $total faults; after $told of them the" \
            "handle refused writes"
    done
    # Of a lack of descriptors no handle may refuse writes: the worker looks.
    for call in $(calls_of "$scenario" opening); do
        every "$scenario" EMFILE "$call"
    done
done

# That the net caught the fish.
count=$((count + 1))
missing=
for call in pwrite fdatasync fsync ftruncate rename unlink mkdir open; do
    calls_of life changing | grep -q "^$call" || missing="$missing $call"
done
if [ -z "$missing" ]; then
    echo "ok $count - a_life_makes_each_call_that_is_to_fail"
else
    echo "not ok $count - a_life_makes_each_call_that_is_to_fail:$missing"
    bad=1
fi
echo "1..$count"
exit $bad
