"""python -m lab PLAN runs what is missing of a plan; python -m lab report draws docs/replication*.md
and README's table."""

import os
import signal
import sys
from pathlib import Path

from engine import flags
from engine.files import InputError, run
from formats import hub
from lab import report, runner
from lab.plan import PLANS, read_plan, ready

LOWEST_PRIORITY = 19
MADE = "runs/"              # where lab/README.md puts models and data


def parse_args(argv=None):
    parser = flags.Parser(prog="python -m lab", description=__doc__)
    add = parser.add_argument
    plans = ", ".join(sorted(path.stem for path in PLANS.glob("*.json")))
    add("plan", help=f"a JSON file, or the name of one in lab/plans/ ({plans}); or the word report")
    add("--runs", type=Path, default=Path("runs/lab"), help="where run directories and logs go")
    add("--results", type=Path, default=runner.RESULTS, help="where the lines go, one file for each plan")
    add("--list", action="store_true", help="name what is missing and can begin; run nothing")
    add("--out", type=Path, default=report.DOCS, help="report: where the page and its plots go; README's too, if neither this nor --results is given")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.plan == "report":
        lines = report.read_all(args.results)
        report.write(lines, args.out)
        own = args.results.resolve() == runner.RESULTS.resolve() and args.out.resolve() == report.DOCS.resolve()
        if own:
            report.write_readme(lines)
        return
    plan = read_plan(args.plan)
    results = args.results / f"{plan['name']}.jsonl"
    if args.list:
        for missing in ready(plan, runner.read_results(results)):
            print(missing.name)
        return
    check_made(plan)
    os.nice(LOWEST_PRIORITY)
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # as Ctrl-C: a run is not left alone
    failed = runner.work(plan, args.runs, results)
    if failed:
        sys.exit(f"{len(failed)} runs failed; the same command tries them again")


def check_made(plan: dict) -> None:
    """InputError for a model or data that lab/README.md tells how to make, before any run fails for it."""
    named = [plan["settings"][key] for key in ("model", "data", "eval-data")]
    missing = [path for path in named if path.startswith(MADE) and not hub.find(path).exists()]
    if missing:
        raise InputError(f"{', '.join(missing)}: not there yet; lab/README.md tells how to make what the plan "
                         f"{plan['name']} needs")


if __name__ == "__main__":
    run(main)
