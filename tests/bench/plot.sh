#!/bin/sh
# Plots from what the benchmark wrote as JSON:
#
#   plot.sh PEERS.json SWEEP.json DIR
#
# DIR/throughput.svg: kvmeta against its peers, for the largest number of
# records in PEERS.json. DIR/scaling.svg: cost of an operation against the
# number of records in SWEEP.json. A file that does not exist is passed over.
set -eu

peers=$1
sweep=$2
dir=$3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# "engine workload records median" for each result.
rows() {
    awk -F '"' '/"engine": / {
        split($0, part, /"records": |, "median": |, "rounds"/)
        print $4, $8, part[2], part[3]
    }' "$1"
}

style='
set terminal svg size 960,480 dynamic font "sans-serif,13" background "#ffffff"
set border 3 lc rgb "#666666"
set tics nomirror
set grid ytics lc rgb "#dddddd" lt 1
'

throughput() {
    rows "$peers" | awk -v out="$work/table" '
        BEGIN {
            n = split("put_random put_batches put_ascending overwrite " \
                      "get_hit_held get_many scan", want, " ")
        }
        $1 == "limits" { next }
        !($1 in seen) { seen[$1] = 1; engines[++m] = $1 }
        { if ($3 > max) max = $3; value[$3, $2, $1] = $4 }
        END {
            printf "workload" > out
            for (e = 1; e <= m; e++) printf " %s", engines[e] > out
            printf "\n" > out
            for (w = 1; w <= n; w++) {
                if (!((max, want[w], "kvmeta") in value)) continue
                name = want[w]
                gsub("_", " ", name)
                printf "\"%s\"", name > out
                for (e = 1; e <= m; e++) {
                    v = value[max, want[w], engines[e]]
                    printf " %s", v == "" ? "nan" : v > out
                }
                printf "\n" > out
            }
            printf "%d %d\n", m, max
        }' > "$work/head"
    read -r engines records < "$work/head"
    gnuplot <<PLOT
$style
set output "$dir/throughput.svg"
set title "Throughput, $records records (logarithmic scale)"
set ylabel "million records a second"
set logscale y
set style data histogram
set style histogram clustered gap 1
set style fill solid 0.9 noborder
set xtics rotate by -15
set key outside right top
plot for [i=2:$engines + 1] "$work/table" using i:xtic(1) \
    title columnheader(i) lc i-1
PLOT
}

# Columns: records, nanoseconds for an operation.
curve() {
    rows "$sweep" | awk -v e="$1" -v w="$2" \
        '$1 == e && $2 == w { print $3, 1000 / $4 }' | sort -n
}

scaling() {
    plots=
    colour=1
    for workload in put_random get_hit_held get_many scan; do
        for engine in kvmeta absl; do
            curve "$engine" "$workload" > "$work/$engine.$workload"
            [ -s "$work/$engine.$workload" ] || continue
            [ "$engine" = kvmeta ] && dash=1 || dash=2
            title="$engine $(echo "$workload" | tr _ ' ')"
            plots="$plots${plots:+, }\"$work/$engine.$workload\" \
                with linespoints lw 2 pt 7 ps 0.6 lc $colour dt $dash \
                title \"$title\""
        done
        colour=$((colour + 1))
    done
    gnuplot <<PLOT
$style
set output "$dir/scaling.svg"
set title "Cost of an operation against the number of records"
set xlabel "records"
set ylabel "nanoseconds (logarithmic scale)"
set logscale xy
set format x "10^{%T}"
set key outside right top
plot $plots
PLOT
}

if [ -f "$peers" ]; then throughput; fi
if [ -f "$sweep" ]; then scaling; fi
