"""Write tiny_reason/openai_labels.yaml from OpenAI's graded solutions.

    python benchmarks/labels.py example_model_solutions.jsonl LICENSE

Both files are from github.com/openai/grade-school-math. The first holds the
answers of four models to the 1,319 test questions of GSM8K. Kept is only
whether each was right: one hexadecimal digit a question, in the file's order,
one bit a model."""
import json
import sys
from pathlib import Path

import yaml

RUNS = {"6b_finetuning": 1, "6b_verification": 2, "175b_finetuning": 4,
        "175b_verification": 8}


def main(source, licence):
    rows = [json.loads(line) for line in
            Path(source).read_text(encoding="utf-8").splitlines()]
    digits = "".join(
        f"{sum(bit for run, bit in RUNS.items() if row[run]['is_correct']):x}"
        for row in rows)
    out = Path(__file__).parents[1] / "tiny_reason" / "openai_labels.yaml"
    out.write_text(yaml.safe_dump(dict(
        source="is_correct of github.com/openai/grade-school-math, "
               "example_model_solutions.jsonl; benchmarks/labels.py",
        bits=RUNS, labels=digits,
        licence=Path(licence).read_text()), sort_keys=False))
    print(f"{len(rows)} questions, {out.stat().st_size} bytes: {out}")


if __name__ == "__main__": main(*sys.argv[1:])
