"""Tasks without noise: the loss after a number of evaluations of loss and gradient, and after a number of seconds.

Run `JAX_PLATFORMS=cpu python benchmarks/noiseless.py --workers 16 --results noiseless.jsonl | tee noiseless.log`: each
worker is a process with one thread. On a GPU, run `--tasks "Poisson;wave;neural" --workers 0`: everything runs in this
process. The file of results has every run, so an interrupted benchmark resumes from it, and a method can join later.
`--tune` only chooses settings, `--compare` uses the chosen ones, and `--report` prints the contents of the file.

Some seeds choose each method's settings for each budget, and others compare the methods. `--time` and `--check` compare
nothing: they time an evaluation of each task, and check gradients, that Adam lowers the losses, and the count of
L-BFGS's evaluations.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import json
import multiprocessing
import os
import pathlib
import sys
import tempfile
import time

import codec_tasks
import jax
import noiseless_checks
import noiseless_optimistix
import noiseless_report
import noiseless_rivals
import noiseless_tasks
import numpy as np
from noiseless_rivals import Setting, lowest, rate_of
from noiseless_search import BASELINE, Job, all_budgets, comparison_jobs, missing_jobs, scaled
from noiseless_task import DATA_VARIABLE

METHODS = noiseless_rivals.METHODS | noiseless_optimistix.METHODS
FIRST_TUNING_SEED = 100
BATCH_SECONDS = 10.0  # The time of the runs that a process makes with a program that it has to load first.
CURVE = 2 ** np.arange(0, 24, 0.125)  # The counts of evaluations whose results are kept, besides the budgets.


@functools.cache
def task_of(name, scale):
    return scaled(noiseless_tasks.TASKS[name](), scale)


@functools.cache
def compiled(name, method_name, own, scale):
    """The method's program for the task, and the seconds that it took to compile; once a process."""
    task = task_of(name, scale)
    most = max(all_budgets(task))
    began = time.perf_counter()
    jitted = METHODS[method_name].compiled(task, own, most)
    program = jitted.lower(task.init(0), task.data(0), most, most, 0.1, (0.9, 0.9)).compile()
    return program, time.perf_counter() - began


def run(job, scale):
    """The stored result of a run: the lowest loss so far at some counts of evaluations, and seconds."""
    task, setting = task_of(job.task, scale), job.setting
    program, compile_seconds = compiled(job.task, job.method, setting.own, scale)
    params, data = jax.block_until_ready((task.init(job.seed), task.data(job.seed)))
    steps = round(setting.stretch * job.budget)
    began = time.perf_counter()
    losses, used = jax.block_until_ready(program(params, data, job.budget, steps, rate_of(setting), setting.betas))
    seconds = time.perf_counter() - began
    losses = lowest(losses)
    counts = sorted({count for count in (*CURVE.astype(int), *all_budgets(task)) if count <= job.budget})
    return {
        "counts": [int(count) for count in counts],
        "losses": [float(losses[count - 1]) for count in counts],
        "used": int(used),
        "seconds": seconds,
        "compile_seconds": compile_seconds,
    }


def prepare(precision, cache):
    """A process: compiled programs are shared by a folder."""
    jax.config.update("jax_default_matmul_precision", precision)
    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def runs(jobs, scale):
    return [run(job, scale) for job in jobs]


def batches(jobs):
    """Lists of jobs of one program, as each process has to load it; the longest first."""
    programs, found = {}, []
    for job in jobs:
        programs.setdefault((job.task, job.method, job.setting.own), []).append(job)
    for group in programs.values():
        length = 0.0
        for job in sorted(group, key=expected_seconds, reverse=True):
            if length == 0.0 or length > BATCH_SECONDS:
                found.append([])
                length = 0.0
            found[-1].append(job)
            length += expected_seconds(job)
    return sorted(found, key=lambda batch: -sum(map(expected_seconds, batch)))


@contextlib.contextmanager
def workers(options):
    """A function from jobs to ``job, result`` for each, as they are ready."""
    if options.workers == 0:
        prepare(options.precision, None)
        yield lambda jobs: ((job, run(job, options.scale)) for batch in batches(jobs) for job in batch)
        return

    def in_processes(jobs):
        futures = {pool.submit(runs, batch, options.scale): batch for batch in batches(jobs)}
        for future in concurrent.futures.as_completed(futures):
            yield from zip(futures[future], future.result(), strict=True)

    with tempfile.TemporaryDirectory() as cache:
        arguments = dict(initializer=prepare, initargs=(options.precision, cache))
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(options.workers, mp_context=context, **arguments) as pool:
            try:
                yield in_processes
            finally:
                pool.shutdown(cancel_futures=True)  # If it was stopped; runs that have begun are waited for.


def conditions(options):
    """The options that a result depends on besides its job; two devices do not share lines of a file."""
    return [options.scale, options.precision, options.device or jax.devices()[0].device_kind]


def key_of(job, options):
    return json.dumps([*job, *conditions(options)])


def read(path, options):
    """``{job: result}`` of the file's runs under these conditions."""
    found = {}
    lines = path.read_text().splitlines() if path.exists() else []
    for line in (line for line in lines if line.endswith("}]")):  # The last one may have been cut off.
        (task, method, (rate, betas, own, stretch), budget, seed, *under), result = json.loads(line)
        if under == conditions(options):
            setting = Setting(rate, tuple(betas), tuple(tuple(pair) for pair in own), stretch)
            found[Job(task, method, setting, budget, seed)] = result
    return found


def extend(found, jobs, options, execute):
    """Runs the jobs, and adds their results to what was found and to the file."""
    began = time.perf_counter()
    with options.results.open("a") as file:
        print(file=file)  # In case the last line was cut off.
        for number, (job, result) in enumerate(execute(jobs), 1):
            found[job] = result
            print(f"[{key_of(job, options)}, {json.dumps(result)}]", file=file, flush=True)
            if time.monotonic() > options.until:
                raise SystemExit("stopped as --minutes asks for; run it again to go on")
            if number % 50 == 0 or number == len(jobs):
                print(f"{time.perf_counter() - began:.0f} s: {number} of {len(jobs)} runs", file=sys.stderr, flush=True)


def expected_seconds(job):
    """Of a run, roughly, on a core of a CPU."""
    if "Levenberg" in job.method:
        return 0.3 * job.budget
    seconds = {"wave": 0.11, "neural": 0.04, "small": 0.02, "4 x": 2.0, "VQE": 0.004}
    return job.budget * next((value for part, value in seconds.items() if part in job.task), 0.0005)


def run_all(pairs, found, options, tuning_seeds):
    """Adds to what was found: the search for settings, and the comparison."""
    with workers(options) as execute:
        while not options.compare:
            # All tasks and methods at a time, so that no core waits for the slowest.
            jobs = [job for pair in pairs for job in missing_jobs(found, *pair, tuning_seeds)]
            if not jobs:
                break
            extend(found, jobs, options, execute)
        if not options.tune:
            seeds = range(options.seeds)
            jobs = [job for pair in pairs for job in comparison_jobs(found, *pair, tuning_seeds, seeds)]
            extend(found, jobs, options, execute)


def suite(options):
    tuning_seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + options.tuning_seeds)
    tasks = {name: task_of(name, options.scale) for name in names_of(options)}
    methods = {
        name: method
        for name, method in METHODS.items()
        if not options.methods or name == BASELINE or any(part in name for part in options.methods.split(","))
    }
    found = read(options.results, options)
    if not options.report:
        pairs = [(task, name, *method) for name, task in tasks.items() for method in methods.items()]
        run_all(pairs, found, options, tuning_seeds)
    if options.tune:
        return
    codec_tasks.print_header(
        "Lowest loss after so many evaluations of loss and gradient; settings chosen for each number by other seeds",
        f"{conditions(options)[-1]}, matmul precision {options.precision or 'default'}, {options.workers} workers",
        f"seeds to choose by: {[*tuning_seeds]}; to compare by: {[*range(options.seeds)]}",
        *noiseless_report.LEGEND,
    )
    curves = {}
    for name, task in tasks.items():
        curves[name] = noiseless_report.print_task(task, name, methods, found, tuning_seeds, range(options.seeds))
    if options.plot:
        noiseless_report.draw(curves, options.plot)


def names_of(options):
    if options.tasks:
        return [name for name in noiseless_tasks.TASKS if any(part in name for part in options.tasks.split(";"))]
    return [name for name in noiseless_tasks.TASKS if not noiseless_tasks.TASKS[name]().is_for_gpu]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="", help='only what contains one of these: "PINN, sin;wave"')
    parser.add_argument("--methods", default="", help='only what contains one of these, and Adam: "L-BFGS,Muon"')
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; 0: all in this one, for a GPU")
    parser.add_argument("--seeds", type=int, default=5, help="to compare by")
    parser.add_argument("--tuning-seeds", type=int, default=3, help="to choose settings by")
    parser.add_argument("--scale", type=float, default=1.0, help="of all budgets, for a trial")
    parser.add_argument("--precision", help='of matrix products on a GPU: "highest"; its own default unless given')
    parser.add_argument("--results", type=pathlib.Path, default="noiseless.jsonl", help="a file to go on from")
    parser.add_argument("--device", help="of which the file's results are taken, with --report; this one unless given")
    parser.add_argument("--minutes", type=float, default=np.inf, help="to stop after; the same command goes on")
    parser.add_argument("--plot", help="a PNG to write")
    parser.add_argument("--data", help="a file that --export wrote, where scikit-learn is missing")
    parser.add_argument("--export", help="a file to write scikit-learn's data to; nothing else is done")
    for part in ("tune", "compare", "report", "time", "check"):
        parser.add_argument(f"--{part}", action="store_true", help="only this, and what it needs")
    options = parser.parse_args()
    options.until = time.monotonic() + 60 * options.minutes
    if options.data:
        os.environ[DATA_VARIABLE] = os.path.abspath(options.data)
    if options.workers or options.time or options.check:
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        os.environ["OMP_NUM_THREADS"] = "1"
    if options.export:
        noiseless_tasks.export(options.export)
        return
    began = time.perf_counter()
    if options.time or options.check:
        tasks = {name: task_of(name, options.scale) for name in names_of(options)}
        (noiseless_checks.times if options.time else noiseless_checks.check)(tasks)
    else:
        suite(options)
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
