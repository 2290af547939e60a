"""Averages gradients of two GPUs over real links: the exchange alone, and a training step of GPT-2.

Run `python benchmarks/wire.py | tee benchmarks/wire_gpu.log` on a machine with two GPUs; `--small` is a miniature on
two CPU devices, to test the script. `--link`, `--task` and `--methods` run a part. All of it takes some twelve minutes,
most of them to compile six steps of GPT-2 on each kind of link. On four GPUs, use `--devices 4`.

One process with all GPUs uses NVLink. A slow link consists of processes with one GPU each, whose NCCL may use only TCP
sockets of the loopback interface; the numbers of sockets and channels determine its speed. The throughput of each link
is measured in the same process. `wire_worker.py` does the work.
"""

import argparse
import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import NamedTuple

HERE = pathlib.Path(__file__).parent
SOCKETS = {
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
    "NCCL_IB_DISABLE": "1",
    "NCCL_NET": "Socket",
    "NCCL_SOCKET_IFNAME": "lo",
}
# For all methods alike: collectives may run beside computation, and processes tune kernels each for themselves.
FLAGS = "--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_shard_autotuning=false"


class Link(NamedTuple):
    """How devices are connected.

    Attributes:
        description: the description in the log.
        is_shared: whether one process has all devices.
        settings: the settings of NCCL.
        seconds: the time after which its processes are ended.
        tasks: the tasks measured on the link.
    """

    description: str
    is_shared: bool
    settings: dict[str, str]
    seconds: int
    tasks: tuple[str, ...]


ALL = ("link", "codec", "exchange", "compile", "step", "overlap")
LINKS = {
    "nvlink": Link("NVLink, one process", True, {}, 300, ALL),
    "sockets": Link("loopback sockets, NCCL's defaults", False, SOCKETS, 240, ("link", "codec", "exchange", "step")),
    "socket": Link(
        "loopback sockets, one channel and one socket",
        False,
        SOCKETS | {"NCCL_MAX_NCHANNELS": "1", "NCCL_NSOCKS_PERTHREAD": "1", "NCCL_SOCKET_NTHREADS": "1"},
        150,
        ("link", "codec", "exchange", "step"),
    ),
    "many": Link(
        "loopback sockets, two channels, four threads of four sockets",
        False,
        SOCKETS | {"NCCL_MAX_NCHANNELS": "2", "NCCL_NSOCKS_PERTHREAD": "4", "NCCL_SOCKET_NTHREADS": "4"},
        60,
        ("link", "codec", "exchange"),
    ),
}


def environment(link, options, process):
    """The environment variables of one of the link's processes."""
    own = dict(os.environ) | link.settings
    own["PYTHONUNBUFFERED"] = "1"
    if not link.is_shared:  # Processes on other links compile the same programs: they use the first one's cache.
        own["JAX_COMPILATION_CACHE_DIR"] = options.cache
    if options.small:
        num = options.devices if link.is_shared else 1
        return own | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={num}"}
    visible = ",".join(map(str, range(options.devices))) if link.is_shared else str(process)
    return own | {
        "XLA_FLAGS": f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip(),
        "CUDA_VISIBLE_DEVICES": visible,
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.85",
    }


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def measure(name, options):
    """Runs a link's processes; the first one's output goes to ours, line by line."""
    link = LINKS[name]
    # The calculator needs the first two; a profile needs the steps.
    needs = {"exchange": {"link", "codec"}, "step": {"link", "codec"}, "overlap": {"link", "codec", "step"}}
    needed = needs.get(options.task, set()) | {options.task}
    tasks = [task for task in link.tasks if options.task == "all" or task in needed]
    count, port = 1 if link.is_shared else options.devices, free_port()
    limit = 6 * link.seconds if options.small else link.seconds
    limit = max(1, min(limit, options.ends_at - time.monotonic()))
    words = f"devices of a CPU in the place of {link.description}" if options.small else link.description
    print(f"\nLINK: {words}", *(f"{k}={v}" for k, v in link.settings.items()), flush=True)
    arguments = [
        str(count),
        str(port),
        options.cache,
        ",".join(tasks),
        ",".join(options.methods),
        *(["small"] if options.small else []),
    ]
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        # The output of the others is shown if they fail.
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(count)]
        processes = [
            subprocess.Popen(
                [sys.executable, str(HERE / "wire_worker.py"), str(i), *arguments],
                env=environment(link, options, i),
                stdout=file if i else None,
                stderr=file,
            )
            for i, file in enumerate(said)
        ]
        end = threading.Timer(limit, lambda: [process.kill() for process in processes])
        end.start()
        codes = [process.wait() for process in processes]
        end.cancel()
        print(f"LINK: {time.perf_counter() - started:.0f} s in all", flush=True)
        for code, file in zip(codes, said, strict=True):
            if code:
                file.seek(0)
                print(f"FAILED with {code}, limit {limit:.0f} s\n", file.read().decode()[-2000:], flush=True)
    return max(map(abs, codes))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", choices=[*LINKS, "all"], default="all")
    parser.add_argument("--task", choices=[*ALL, "all"], default="all", help="with what it needs")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="in miniature, on devices of a CPU")
    parser.add_argument("--methods", nargs="+", default=[], help='only these, such as "two trits"')
    parser.add_argument("--seconds", type=float, default=3600, help="after which all ends")
    options = parser.parse_args()
    options.ends_at = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as options.cache:
        names = list(LINKS) if options.link == "all" else [options.link]
        sys.exit(max([measure(name, options) for name in names]))


if __name__ == "__main__":
    main()
