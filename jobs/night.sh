#!/usr/bin/env bash
# A night for cron: submits `python -m jobs.score` with the flags given here to a Ray cluster, RAY_API_SERVER_ADDRESS or
# this machine's, at most three times, ten minutes apart, and ends with the job's own exit code.
#
#     jobs/night.sh --archive s3://hospital/ct --model s3://models/darnet-1 --results s3://hospital/darnet
#
# `ray job submit` ends with 1 whatever the job failed of, and with 0 if somebody stopped it; so the code is read from
# the job's summary, a line of JSON in what it printed. Tried again is what may pass another time: 1 (the cluster gave
# up, or has no worker now), 4 (a store), and no summary (no cluster, a killed driver, a log that broke off), which
# counts as 1. Wrong use (2), a held night (3), credentials (5) and a job that somebody stopped (1) wait for a person.
# Started again on the same day, it goes on at the first submission id that is free.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
export RAY_API_SERVER_ADDRESS="${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}"
night=$(date -u +%F)
told=$(mktemp) || exit 1
trap 'rm -f "$told"' EXIT
number=0
for attempt in 1 2 3; do
    [ "$attempt" = 1 ] || sleep 600
    while
        number=$((number + 1))
        ray job submit --submission-id "night-$night-a$number" --working-dir . -- \
            python -m jobs.score "$@" 2>&1 | tee "$told"
        [ "$number" -lt 100 ] && grep -q "submission_id night-$night-a$number already exists" "$told"
    do :; done
    code=$(sed -nE 's/.*\{"job": "score", .*"exit_code": ([0-9]+)\}$/\1/p' "$told" | tail -n 1)
    if [ -z "$code" ]; then
        code=1
        ! grep -q "Job 'night-$night-a$number' was stopped" "$told" || break
    fi
    [ "$code" = 1 ] || [ "$code" = 4 ] || break
    echo "night.sh: attempt $attempt ended with $code" >&2
done
exit "$code"
