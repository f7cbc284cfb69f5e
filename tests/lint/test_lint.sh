#!/usr/bin/env bash
#
# What can be told of the code without running it; prints TAP.
#
#   tests/lint/test_lint.sh          what `make check` runs: a compiler only
#   tests/lint/test_lint.sh --full   what `make lint` runs: every compiler,
#                                    standard and analyser that is installed
#
# SPDX-License-Identifier: MIT

set -u
cd "$(dirname "$0")/../.." || exit 1

full=0
[ "${1-}" = --full ] && full=1
build=${BUILD:-build}
cc=${CC:-cc}
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT

base='-Wall -Wextra -Wpedantic -Wshadow -Wstrict-prototypes
    -Wmissing-prototypes -Wcast-qual -Wundef -Wvla -Wwrite-strings'
strict="$base -Wconversion -Wsign-conversion"
zstd=$(pkg-config --cflags libzstd 2>/dev/null)
cmocka=$(pkg-config --cflags cmocka 2>/dev/null)
tests_include="-I. -Itests -Itests/support -Itests/sim $cmocka $zstd"

# --------------------------------------------------------------------------
# Results
# --------------------------------------------------------------------------

count=0
bad=0

# Runs a check: its name, a sentence with underscores; the command. What the
# command prints is shown when it fails. 77 means: a tool is missing.
check() {
    local name=$1 status
    shift
    count=$((count + 1))
    ("$@") >"$scratch/out" 2>&1 </dev/null
    status=$?
    if [ $status = 0 ]; then
        echo "ok $count - $name"
    elif [ $status = 77 ]; then
        echo "ok $count - $name # SKIP $(tail -n 1 "$scratch/out")"
    else
        echo "not ok $count - $name"
        head -n 40 "$scratch/out" | sed 's/^/# /'
        echo "replay: tests/lint/test_lint.sh$([ $full = 1 ] && echo ' --full')"
        bad=1
    fi
}

need() {
    command -v "$1" >/dev/null 2>&1 || { echo "no $1"; exit 77; }
}

# --------------------------------------------------------------------------
# Checks that need a compiler only
# --------------------------------------------------------------------------

# The program in README.md is the one that is compiled and run.
readme() {
    awk '/^```c$/ { on = 1; next } /^```$/ { if (on) exit } on' README.md |
        diff - examples/quickstart.c
}

# The program that README.md shows does what the comment there says, twice.
quickstart() (
    program=$PWD/$build/quickstart
    cd "$scratch" || exit 1
    for _ in 1 2; do
        "$program" >out.txt || exit 1
        printf '%s\n' 'object 42 is on disk 2 now' \
            'object 42: disk 2, sector 8192' | diff - out.txt || exit 1
    done
)

compile() { # compiler, flags ...
    # shellcheck disable=SC2086
    "$@" $strict -Werror $zstd -I. -c kvmeta.c -o "$scratch/kvmeta.o"
}

as_static() { # compiler, flags ...
    printf '#define KVMETA_STATIC 1\n#include "kvmeta.c"\n%s\n' \
        'int main(void) { return kvmeta_version()[0] == 0; }' \
        >"$scratch/static.c"
    # shellcheck disable=SC2086
    "$@" $strict -Werror $zstd -I. -c "$scratch/static.c" \
        -o "$scratch/static.o" || return 1
    nm -g "$scratch/static.o" | awk 'NF == 3 && $3 !~ /^_?main$/ {
        print "defines", $3; bad = 1 } END { exit bad }'
}

header_cxx() { # compiler, standard
    need "$1"
    printf '#include "kvmeta.h"\n%s\n' \
        'int main() { return kvmeta_cursor_next(NULL); }' >"$scratch/header.cc"
    "$1" "-std=$2" -Wall -Wextra -Wpedantic -Werror -I. -fsyntax-only \
        "$scratch/header.cc"
}

header_alone() { # compiler
    printf '#include "kvmeta.h"\nint main(void) { return KVMETA_OK; }\n' \
        >"$scratch/header.c"
    # shellcheck disable=SC2086
    "$1" -std=c11 $strict -Werror -I. -fsyntax-only "$scratch/header.c"
}

# Of the archive every global name; of the shared object what it exports.
exports() {
    local so
    need nm
    for so in "$build"/libkvmeta.so "$build"/libkvmeta.dylib; do
        [ -e "$so" ] && nm -D --defined-only "$so" 2>/dev/null
    done >"$scratch/names"
    nm -g "$build/libkvmeta.a" >>"$scratch/names"
    grep -q kvmeta_open "$scratch/names" || { echo "no names seen"; return 1; }
    awk 'NF == 3 && $2 ~ /^[A-TV-Z]$/ && $3 !~ /^_?kvmeta_/ {
        print "exported:", $3; bad = 1 } END { exit bad }' "$scratch/names"
    # Each function of the header is there.
    grep -oE '\bkvmeta_[a-z0-9_]+\(' kvmeta.h | tr -d '(' | sort -u |
        while read -r name; do
            grep -qE "^(KVMETA_API.*[ *]|)$name\(" kvmeta.h || continue
            grep -q "T _\\?$name\$" "$scratch/names" ||
                { echo "missing: $name"; echo x >>"$scratch/missing"; }
        done
    [ ! -e "$scratch/missing" ]
}

# The library never prints, ends the process, takes signals over, reads the
# environment, or calls what is not safe from many threads. (What assert()
# calls has a name of its own.)
no_calls() {
    need nm
    nm -u "$build/kvmeta.o" | awk '
        { name = $NF; sub(/^_/, "", name) }
        name ~ /^(abort|exit|_exit|quick_exit|atexit|printf|puts|putchar)$/ ||
        name ~ /^(perror|getenv|secure_getenv|setenv|signal|sigaction)$/ ||
        name ~ /^(longjmp|rand|srand|strerror|localtime|gmtime|system)$/ ||
        name ~ /^(popen|fork|vprintf|stdout|stderr)$/ {
            print "calls", name; bad = 1 }
        END { exit bad }'
}

columns() {
    git ls-files '*.c' '*.h' 2>/dev/null >"$scratch/files"
    [ -s "$scratch/files" ] || ls ./*.c ./*.h examples/*.c tests/*/*.[ch] \
        >"$scratch/files"
    # shellcheck disable=SC2046
    awk 'length > 90 { print FILENAME ":" FNR ": " length " columns"; bad = 1 }
        /\t/ { print FILENAME ":" FNR ": tab"; bad = 1 }
        / $/ { print FILENAME ":" FNR ": blank at the end"; bad = 1 }
        END { exit bad }' $(cat "$scratch/files")
}

c_files() { # compiler, files ...
    local compiler=$1 file failed=0
    shift
    for file; do
        # shellcheck disable=SC2086
        "$compiler" -std=c11 $base -Werror $tests_include -fsyntax-only \
            "$file" || failed=1
    done
    return $failed
}

check readme_shows_the_quickstart_as_it_is readme
check quickstart_prints_what_it_should quickstart
check kvmeta_c_alone_compiles_without_a_warning compile "$cc" -std=c11 -O2
check static_in_one_unit_defines_nothing as_static "$cc" -std=c11
check without_assertions_there_is_no_warning \
    compile "$cc" -std=c11 -O1 -DNDEBUG
check header_compiles_alone header_alone "$cc"
check header_compiles_as_cxx11 header_cxx c++ c++11
check only_kvmeta_names_are_exported exports
check library_calls_nothing_that_it_promised_not_to no_calls
check functions_have_at_most_70_lines tests/lint/functions kvmeta.c
check lines_have_at_most_90_columns columns
check examples_compile_without_a_warning c_files "$cc" examples/*.c

# --------------------------------------------------------------------------
# Checks that need other tools
# --------------------------------------------------------------------------

with() { # compiler, flags ...
    need "$1"
    compile "$@"
}

analyzer() {
    need gcc
    # shellcheck disable=SC2086
    gcc -std=c11 -O1 -fanalyzer $strict -Werror $zstd -I. -c kvmeta.c \
        -o "$scratch/a.o"
}

scan() {
    need clang
    # shellcheck disable=SC2086
    clang --analyze -Xclang -analyzer-output=text -Xclang \
        -analyzer-werror -std=c11 $zstd -I. kvmeta.c -o "$scratch/scan"
}

with_cppcheck() {
    need cppcheck
    cppcheck --quiet --std=c11 --enable=warning,performance,portability \
        --inline-suppr --error-exitcode=1 --suppress=missingIncludeSystem \
        kvmeta.c
}

tidy() {
    need clang-tidy
    # shellcheck disable=SC2086
    clang-tidy --quiet --config-file=tests/lint/clang-tidy.yaml kvmeta.c -- \
        -std=c11 -I. $zstd
}

shells() {
    need shellcheck
    shellcheck -S warning .ci/run tests/run tests/deps \
        tests/lint/functions tests/mutants/protocol tests/ports/run \
        tests/*/*.sh
}

# Those of tests/bench are built where the other stores are installed.
all_tests() {
    need "$1"
    local files=() file
    for file in tests/*/*.c; do
        case $file in tests/bench/*) ;; *) files+=("$file") ;; esac
    done
    c_files "$1" "${files[@]}"
}

if [ $full = 1 ]; then
    for compiler in gcc clang; do
        for standard in c11 c17 c2x gnu11; do
            check "${compiler}_${standard}_has_no_warning" \
                with $compiler -std=$standard -O2
        done
        for level in 0 3 s; do
            check "${compiler}_O${level}_has_no_warning" \
                with $compiler -std=c11 -O$level
        done
        check "${compiler}_tests_have_no_warning" all_tests $compiler
        check "${compiler}_static_has_no_warning" as_static $compiler -std=c11
    done
    for compiler in g++ clang++; do
        for standard in c++11 c++14 c++17 c++20; do
            check "header_${compiler}_${standard}" \
                header_cxx $compiler $standard
        done
    done
    check gcc_analyzer_finds_nothing analyzer
    check clang_analyzer_finds_nothing scan
    check cppcheck_finds_nothing with_cppcheck
    check clang_tidy_finds_nothing tidy
    check shellcheck_finds_nothing shells
fi

echo "1..$count"
tests/lint/functions kvmeta.c | sed 's/^/# /'

# Only told: another clang-format lays out a few lines differently.
if [ $full = 1 ] && command -v clang-format >/dev/null; then
    for file in kvmeta.h kvmeta.c examples/*.c tests/*/*.[ch]; do
        clang-format "$file" | diff "$file" - | grep -c '^<' |
            sed "s|^|# clang-format: $file: lines that it would change: |"
    done | grep -v ': 0$'
fi
exit $bad
