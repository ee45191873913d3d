#!/usr/bin/env bash
# The demo: a local stack, the demo model, a file of prompts, and the pictures that come of it.
# Run again, it draws another batch on the stack's data of the last time.
set -euo pipefail
cd "$(dirname "$0")/.."

PATH=$PWD/target/release:$PATH
out=demo/out
export DARKROOM_PRINCIPAL=${DARKROOM_PRINCIPAL:-$(id -un)}
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
[ -t 1 ] || say() { printf '\n%s\n' "$*"; }
started=$SECONDS

say "1. The local stack: PostgreSQL, RabbitMQ, S3, the serve loops, a worker on the CPU"
darkroom up --detach
# Only what this run started is stopped at its end.
trap 'darkroom down >/dev/null 2>&1 || true' EXIT

say "2. The demo model and its licence"
darkroom models add demo demo/model --licence demo/model/LICENSE
licence_sha256=$(sha256sum demo/model/LICENSE | cut -d' ' -f1)
darkroom licence accept demo --yes "$licence_sha256"

say "3. A batch: demo/prompts.csv"
darkroom submit demo/prompts.csv --model demo --name demo
darkroom watch latest

say "4. The pictures"
rm -rf "$out"
darkroom fetch latest --output "$out" --contact-sheet "$out/contact-sheet.png"

say "5. The records, in SQL"
set -a; . .darkroom/env; set +a
psql "$DATABASE_URL" --quiet --pset=footer=off <<'SQL'
SELECT ordinal, left(prompt, 52) AS prompt, seed,
       CASE WHEN has_nsfw_concept THEN 'withheld' ELSE 'published' END AS verdict,
       round(safety_margin::numeric, 3) AS highest_score
FROM (
    SELECT ordinal, prompt, seed, has_nsfw_concept,
           (SELECT max(score) FROM unnest(concept_scores) AS score) AS safety_margin
    FROM v_images
    WHERE batch_id = (SELECT batch_id FROM batches ORDER BY created_at DESC LIMIT 1)
) AS results
ORDER BY ordinal;
SQL

say "Done in $((SECONDS - started)) s after the build"
cat <<END
Look at   $out/contact-sheet.png
and at    $out/*.png (each carries its prompt, seed and settings as text chunks)
Go on:    darkroom up --detach                 # in target/release, as all commands below
          darkroom submit my-prompts.txt --model demo --num-images-per-prompt 4
          darkroom watch latest && darkroom fetch latest --output pictures --contact-sheet sheet.png
          psql "\$(. .darkroom/env; echo "\$DATABASE_URL")" -c 'TABLE v_batch_progress'
          darkroom down
END
