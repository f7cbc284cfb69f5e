#!/usr/bin/env bash
#
# Runs every input of fuzz/corpus once, without a fuzzer and with any
# compiler; prints TAP.
#
# SPDX-License-Identifier: MIT

set -u
cd "$(dirname "$0")/../.." || exit 1
out=$PWD/${BUILD:-build}/fuzz
case ${BUILD:-build} in /*) out=$BUILD/fuzz ;; esac

count=0
bad=0
for directory in fuzz/corpus/*/; do
    target=$(basename "$directory")
    count=$((count + 1))
    if text=$(make -s --no-print-directory -C fuzz OUT="$out" \
            "$out/replay_$target" 2>&1 &&
            cd fuzz && "$out/replay_$target" "corpus/$target" 2>&1); then
        echo "ok $count - corpus_of_${target}_is_handled"
        echo "# $target: $(printf '%s\n' "$text" | tail -n 1 |
            sed 's/.*PASSED *\] *\([0-9]*\) test.*/\1 inputs/')"
    else
        echo "not ok $count - corpus_of_${target}_is_handled"
        printf '%s\n' "$text" | tail -n 20 | sed 's/^/# /'
        echo "replay: make -C fuzz replay"
        bad=1
    fi
done
echo "1..$count"
exit $bad
