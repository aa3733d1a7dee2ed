#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Opens an issue with the first lines of what broke, or adds them to the open issue of the same target.
#   scripts/open_issue.sh TARGET LOG      (RUN: address of the run; GH: the command, by default gh)
set -euo pipefail
target=$1 log=$2 gh=${GH:-gh}
title="nightly: make $target fails"
body=$(mktemp)
trap 'rm -f "$body"' EXIT
python3 "$(dirname "$0")/first_failure.py" "$log" > "$body"
[ -z "${RUN:-}" ] || printf '\n%s\n' "$RUN" >> "$body"
number=$("$gh" issue list --state open --search "in:title \"$title\"" --json number --jq '.[0].number // empty')
if [ -n "$number" ]; then
  "$gh" issue comment "$number" --body-file "$body"
else
  "$gh" issue create --title "$title" --body-file "$body"
fi
