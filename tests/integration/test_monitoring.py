"""Real receivers of a run's scalars: TensorBoard in a browser, Prometheus over HTTP, trackers.

Two forked ranks train on dirty shards, once with all receivers and once with none.
"""

import importlib.util
import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ds_linclip.config import Config, load_config
from ds_linclip.model.flops import step_flops
from ds_linclip.monitoring.scalars import SCALARS
from ds_linclip.monitoring.tensorboard import dashboards
from ds_linclip.monitoring.trackers import wandb_run
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.spawn import run_ranks
from ds_linclip.process.consensus import AgreedError
from ds_linclip.trainer import train
from helpers import EMBEDDED, REPOSITORY
from helpers.dirty_shards import write_dirty_shards
from helpers.evaluators import Scores
from linclip_eval.zero_shot.training_evaluator import HeldOutEvaluator

pytestmark = pytest.mark.distributed
STEPS = 6
PEAK_TFLOPS = 0.25


def config_of(output: Path, name: str, shards: Path, digits: Path, *more: str) -> Config:
    return load_config(
        EMBEDDED,
        [
            *(f"output_dir={output}", f"name={name}", f"eval.data={digits}/test"),
            *(f"data.train=['{shards}/{{00000..00007}}.tar']", "data.max_bad_samples=1"),
            *("data.num_workers=0", "model.vision.layers=1", "model.text.layers=1"),
            *(f"train.steps={STEPS}", "train.global_batch_size=32", "optim.warmup_steps=1"),
            *("log.every_steps=1", "checkpoint.every_steps=2", "eval.every_steps=2", *more),
        ],
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def train_and_scrape(config: Config) -> None:
    """Train; rank 0 scrapes the endpoint in every evaluation and saves the answers."""
    mesh = Mesh.create(config.parallel)
    score = HeldOutEvaluator.from_config(config, device=mesh.device, group=mesh.dp.group)
    port, scrapes = config.log.prometheus_port, []

    def evaluate(model: Any, writer: Any, step: int) -> Any:
        if mesh.rank == 0 and port is not None:
            scrapes.append(scrape(port))
        return score(model, writer, step)

    train(config, mesh, Scores(evaluate))
    if mesh.rank == 0 and port is not None:
        with pytest.raises(urllib.error.URLError):
            scrape(port)
        (config.run_dir / "scrapes.json").write_text(json.dumps(scrapes))
    mesh.close()


@pytest.fixture(scope="module")
def shards(digits, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dirty")
    write_dirty_shards(digits, folder)
    return folder


@pytest.fixture(scope="module")
def monitored(shards, digits, tmp_path_factory) -> Config:
    requested = (f"log.prometheus_port={free_port()}", f"log.peak_tflops={PEAK_TFLOPS}")
    config = config_of(tmp_path_factory.mktemp("runs"), "monitored", shards, digits, *requested)
    run_ranks(2, train_and_scrape, config)
    return config


@pytest.fixture(scope="module")
def unmonitored(monitored, shards, digits) -> Config:
    output = Path(monitored.output_dir)
    config = config_of(output, "unmonitored", shards, digits, "log.tensorboard=false")
    run_ranks(2, train_and_scrape, config)
    return config


def records(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").open()]


def families(text: str) -> dict[str, Any]:
    """Return families by the names of their samples; a counter's family lacks the "_total"."""
    found = text_string_to_metric_families(text)
    return {sample.name: family for family in found for sample in family.samples}


def test_dashboards_show_every_scalar_and_no_other(monitored):
    board = EventAccumulator(str(monitored.run_dir / "tensorboard"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    assert tags == {tag for record in records(monitored) for tag in record if tag != "step"}
    layout = dashboards()
    assert list(layout) == [
        *("Loss", "Throughput and MFU", "Data health", "Parallel efficiency", "Evaluation")
    ]
    for charts in layout.values():
        for _, expressions in charts.values():
            for expression in expressions:
                shown = {tag for tag in tags if re.match(expression, tag)}
                assert shown, expression
                tags -= shown
    assert not tags


def test_documentation_names_every_scalar_and_metric(monitored):
    text = (REPOSITORY / "docs" / "monitoring.md").read_text()
    for scalar in SCALARS:
        assert f"| `{scalar.tag}{'<cause>' * scalar.is_family}` |" in text
    assert set(re.findall(r"`(linclip_\w+)", text)) == set(families(last_scrape(monitored)))


def test_rates_are_those_of_the_models_operations(monitored):
    last = [record for record in records(monitored) if "perf/mfu" in record][-1]
    per_pair = step_flops(monitored, 0) / monitored.train.global_batch_size
    rate = per_pair * last["perf/samples_per_second"] / 2 / 1e12
    assert last["perf/model_tflops_per_device"] == pytest.approx(rate)
    assert last["perf/mfu"] == pytest.approx(rate / PEAK_TFLOPS)
    assert 0.5 <= last["perf/load_balance"] <= 1


def test_training_is_the_same_bit_for_bit_without_monitoring(monitored, unmonitored):
    assert not (unmonitored.run_dir / "tensorboard").exists()
    assert len(records(monitored)) == len(records(unmonitored)) == STEPS + 3
    for one, other in zip(records(monitored), records(unmonitored), strict=True):
        results = [tag for tag in one if not tag.startswith("perf/")]
        assert {tag: one[tag] for tag in results} == {tag: other[tag] for tag in results}
    for rank in (0, 1):
        file = f"checkpoints/step-{STEPS:08d}/rank-{rank:05d}.safetensors"
        one, other = load_file(monitored.run_dir / file), load_file(unmonitored.run_dir / file)
        assert one.keys() == other.keys()
        assert all(one[name].equal(other[name]) for name in one)


def last_scrape(monitored: Config) -> str:
    return str(json.loads((monitored.run_dir / "scrapes.json").read_text())[-1])


def test_prometheus_shows_the_progress_of_the_run(monitored):
    scrapes = json.loads((monitored.run_dir / "scrapes.json").read_text())
    for number, text in enumerate(scrapes, 1):
        step, found = 2 * number, families(text)
        logged = [record for record in records(monitored) if record["step"] <= step]
        logged = [record for record in logged if record["step"] < step or "train/loss" in record]
        newest = {tag: value for record in logged for tag, value in record.items()}
        for scalar in SCALARS:
            values = [v for tag, v in newest.items() if scalar.cause(tag) is not None]
            assert bool(values) == (scalar.metric in found), scalar
            exported = [s.value for s in found[scalar.metric].samples] if values else []
            assert exported == pytest.approx([value * scalar.factor for value in values])
        assert found["linclip_step"].samples[0].value == step
        assert found["linclip_planned_steps"].samples[0].value == STEPS
        (phase,) = found["linclip_phase_start_timestamp_seconds"].samples
        assert phase.labels == {"phase": "evaluating"}
        assert 0 <= time.time() - phase.value < 600
        assert found["linclip_run_info"].samples[0].labels == {"run": "monitored"}
    assert families(scrapes[-1])["linclip_checkpoint_step"].samples[0].value in (STEPS - 2, STEPS)
    causes = families(scrapes[-1])["linclip_skipped_samples_by_cause_total"].samples
    assert {sample.labels["cause"] for sample in causes} >= {"text_empty"}


def test_metrics_are_named_by_the_rules_of_prometheus(monitored):
    """prometheus.io/docs/practices/naming: one prefix, base units, counters end in _total."""
    for name, family in families(last_scrape(monitored)).items():
        assert re.fullmatch(r"linclip(_[a-z0-9]+)+", name)
        assert (family.type == "counter") == name.endswith("_total")
        assert not re.search(r"_(gib|mib|tflops|ms|percent)(_|$)", name)
        assert family.documentation


def test_grafana_dashboard_shows_every_metric_and_no_other(monitored):
    dashboard = json.loads((REPOSITORY / "launch" / "grafana.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    used = set()
    for panel in panels:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            used |= set(re.findall(r"linclip_\w+", target["expr"]))
    assert used == set(families(last_scrape(monitored)))


def try_to_train(configs: list[Config]) -> None:
    """Write the error that every rank gets from each config to refusals-N.json."""
    mesh = Mesh.create(configs[0].parallel)
    refusals = []
    for config in configs:
        with pytest.raises(AgreedError) as refusal:
            train(config, mesh)
        refusals.append(str(refusal.value))
    output = Path(configs[0].output_dir)
    (output / f"refusals-{mesh.rank}.json").write_text(json.dumps(refusals))
    mesh.close()


def test_receiver_that_cannot_be_opened_is_named_before_the_start(shards, digits, tmp_path):
    absent = [name for name in ("wandb", "trackio") if importlib.util.find_spec(name) is None]
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        requested = {"port": f"prometheus_port={port}"} | {name: f"{name}=p" for name in absent}
        configs = [
            config_of(tmp_path, name, shards, digits, f"log.{what}")
            for name, what in requested.items()
        ]
        run_ranks(2, try_to_train, configs)
    first, *others = ranks = json.loads((tmp_path / "refusals-0.json").read_text())
    assert ranks == json.loads((tmp_path / "refusals-1.json").read_text())
    assert re.match(rf"log\.prometheus_port \({port}\) cannot be listened on: .*in use", first)
    for name, refusal in zip(absent, others, strict=True):
        assert re.match(rf"log\.{name} \(p\) needs the package .*pip install {name}", refusal)
    assert all("\n" not in refusal for refusal in ranks)
    assert not list(tmp_path.glob("*/config.yaml"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("log.prometheus_port=65536", r"log\.prometheus_port \(65536\) must be in 1\.\.65535"),
        ("log.prometheus_port=0", r"log\.prometheus_port \(0\) must be in 1\.\.65535"),
        ("log.wandb=''", r"log\.wandb \(''\) must be the name of a project, or null"),
        ("log.peak_tflops=0", r"log\.peak_tflops \(0\.0\) must be greater than 0"),
    ],
)
def test_invalid_settings_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(EMBEDDED, [override])


@pytest.fixture
def tensorboard(monitored) -> Iterator[str]:
    """Yield the address of a real server on the run's folder."""
    command = [Path(sys.executable).with_name("tensorboard"), "--logdir", monitored.run_dir]
    command += ["--host", "127.0.0.1", "--port", "0", "--load_fast=false"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            lines = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in server.stderr)
            yield next(found[0] for found in lines if found)
        finally:
            server.terminate()


def find(browser: Any, tag: str, show: str) -> list[Any]:
    """Return ``show`` of every ``node`` of a tag, including those within shadow roots."""
    script = f"""
        const found = [];
        (function walk(node) {{
            if (node.tagName && node.tagName.toLowerCase() == "{tag}") found.push(node);
            if (node.shadowRoot) walk(node.shadowRoot);
            node.childNodes.forEach(walk);
        }})(document);
        return found.map(node => {show});
    """
    return list(browser.execute_script(script))


def test_tensorboard_shows_it_all(monitored, tensorboard, browser, tmp_path):
    def opened(page: str, tag: str, show: str, is_there: Any) -> list[Any]:
        """Return what a page shows once it is loaded, or after half a minute."""
        browser.get("about:blank")
        browser.get(f"{tensorboard}/#{page}")
        deadline = time.monotonic() + 30
        while not is_there(seen := find(browser, tag, show)) and time.monotonic() < deadline:
            time.sleep(0.2)
        return seen

    # Points of every line of every chart of the dashboards. A chart that is scaled without its
    # outliers leaves out points that lie too far off.
    browser.get(tensorboard)
    browser.execute_script("localStorage.setItem('_ignoreYOutliers', 'false')")
    lines = (
        "[...node.shadowRoot.querySelectorAll('.line-plot:not(.ghost) path.line')]"
        ".map(path => (path.getAttribute('d') || '').split(/[ML]/).length - 1)"
    )
    layout = dashboards()
    written = Counter(
        tag for record in records(monitored) for tag, value in record.items() if value is not None
    )
    expected = []
    for _, expressions in (chart for charts in layout.values() for chart in charts.values()):
        tags = [tag for tag in written for each in expressions if re.match(each, tag)]
        expected.append([written[tag] for tag in tags])
    drawn = opened("custom_scalars", "vz-line-chart2", lines, lambda seen: seen == expected)
    assert drawn == expected
    titles = find(browser, "tf-category-paginated-view", "node.category.name")
    assert titles == list(layout)
    shot = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    shot.save(tmp_path / "dashboards.png")
    red, green, blue = np.asarray(shot).astype(int)[200:, 400:].transpose(2, 0, 1)
    assert ((red > 200) & (red - green > 80) & (green > blue)).sum() > 1000  # lines of the run

    cells = opened(
        *("hparams", "vaadin-grid-cell-content", "node.textContent.trim()"),
        lambda seen: "softmax" in seen,
    )
    assert {"loss.kind", "model.embed_dim", "train/loss", "eval/zeroshot_top1"} <= set(cells)
    loss = [record["train/loss"] for record in records(monitored) if "train/loss" in record][-1]
    assert f"{loss:.5g}" in cells
    names = {name.strip() for name in find(browser, "paper-checkbox", "node.textContent")}
    assert {"optim.lr", "train.global_batch_size", "zero.stage", "ranks"} <= names

    texts = opened(
        *("text", "tf-markdown-view", "node.shadowRoot ? node.shadowRoot.textContent : ''"),
        lambda seen: any("parameters, M" in text for text in seen),
    )
    assert any(f"global_batch_size: {monitored.train.global_batch_size}" in text for text in texts)

    groups = opened(
        *("scalars", "tf-category-paginated-view", "node.category.name"),
        lambda seen: "train" in seen,
    )
    assert {"train", "perf", "data", "eval"} <= set(groups)
    assert "data/bad_shards" in find(browser, "tf-scalar-card", "node.tag")  # the first is open
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert severe == []


def tracked(config: Config, environment: dict[str, str]) -> None:
    os.environ |= environment
    mesh = Mesh.create(config.parallel)
    train(config, mesh)
    mesh.close()


def missing(name: str) -> pytest.MarkDecorator:
    is_missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(is_missing, reason=f"{name} is not installed (pip install {name})")


def wandb_records(path: Path) -> Iterator[bytes]:
    """Yield the records of an offline run: LevelDB's log format after seven bytes of wandb's."""
    content, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        size, kind = struct.unpack_from("<HB", content, position + 4)
        parts += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@missing("wandb")
def test_weights_and_biases_gets_every_scalar(shards, digits, tmp_path):
    from wandb.proto.wandb_internal_pb2 import Record

    config = config_of(tmp_path, "run", shards, digits, "log.wandb=project")
    run_ranks(2, tracked, config, {"WANDB_MODE": "offline", "WANDB_SILENT": "true"})
    (path,) = config.run_dir.glob("wandb/offline-run-*/*.wandb")
    rows, runs = [], []
    for content in wandb_records(path):
        record = Record.FromString(content)
        if record.WhichOneof("record_type") == "run":
            runs.append(record.run)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in items})
    assert {(run.project, run.display_name, run.run_group) for run in runs} == {
        ("project", "run", "run")
    }
    assert [row["train/loss"] for row in rows] == [r["train/loss"] for r in records(config)]


@missing("wandb")
def test_weights_and_biases_without_an_account_is_named_before_the_start(
    shards, digits, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    config = config_of(tmp_path, "run", shards, digits, "log.wandb=project")
    with pytest.raises(
        ValueError, match=r"^log\.wandb \(project\) needs an account: run wandb login"
    ):
        wandb_run(config).__enter__()


@missing("trackio")
def test_trackio_gets_every_scalar(shards, digits, tmp_path):
    config = config_of(tmp_path, "run", shards, digits, "log.trackio=project")
    run_ranks(2, tracked, config, {"TRACKIO_DIR": str(tmp_path / "trackio")})
    read = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as s;"
        "print(json.dumps([[r['step'], r['train/loss']] for r in s.get_logs('project', 'run')]))"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run(
        [sys.executable, "-c", read], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [[r["step"], r["train/loss"]] for r in records(config)]
