"""Fixtures of all tests: the embedded dataset, launchers with gloo ranks, a browser."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from helpers import REPOSITORY, job_environment

if TYPE_CHECKING:
    from selenium import webdriver

# The ranks that tests start are gloo ranks on the CPU, also on a machine with GPUs.
os.environ["DS_ACCELERATOR"] = "cpu"
# Scripts find the commands of this environment, as in one that is activated.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
# Property tests: the same examples at every run; make test-slow tries many new ones.
settings.register_profile(
    "quick",
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "thorough", settings.get_profile("quick"), derandomize=False, max_examples=3000
)
settings.load_profile("quick")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the embedded dataset with the command that users run; return its folder."""
    folder = tmp_path_factory.mktemp("data") / "embedded"
    command = [Path(sys.executable).parent / "linclip", "shards", "make", "digits", folder]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return folder


@pytest.fixture(scope="session")
def embedded_overrides(digits: Path) -> list[str]:
    """Return overrides that point the embedded config at the dataset of this test run."""
    return [f"data.train=['{digits}/train/{{00000..00007}}.tar']", f"eval.data={digits}/test"]


@pytest.fixture(scope="session")
def start_deepspeed_cpu() -> Callable[..., subprocess.Popen[str]]:
    """Start ``deepspeed --module MODULE ARGS`` with gloo ranks; returns the running launcher."""

    def start(module: str, *arguments: object, ranks: int = 2) -> subprocess.Popen[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = Path(sys.executable).parent / "deepspeed"
        command = [launcher, "--quiet", "--num_gpus", ranks, "--master_port", port]
        command += ["--module", module]
        return subprocess.Popen(
            [str(part) for part in (*command, *arguments)],
            cwd=REPOSITORY,
            env=job_environment(OMP_NUM_THREADS="1"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.fixture(scope="session")
def deepspeed_cpu(
    start_deepspeed_cpu: Callable[..., subprocess.Popen[str]],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``deepspeed --module MODULE ARGS`` with gloo ranks; returns the finished launcher."""

    def run(
        module: str, *arguments: object, ranks: int = 2, timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        with start_deepspeed_cpu(module, *arguments, ranks=ranks) as running:
            try:
                out, err = running.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGKILL)  # the launcher would leave its ranks
                raise
            return subprocess.CompletedProcess(running.args, running.returncode, out, err)

    return run


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator["webdriver.Chrome"]:
    """Yield a headless Chromium; skip the test where selenium or chromedriver is missing."""
    webdriver = pytest.importorskip("selenium.webdriver")
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("no chromedriver on this machine")
    options = webdriver.ChromeOptions()
    for argument in (
        *("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"),
        *("--disable-background-networking", "--no-first-run", "--disable-component-update"),
        f"--user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()
