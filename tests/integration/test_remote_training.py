"""Training from shards behind real servers gives the bits of a run from local files."""

import json
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from helpers import EMBEDDED, REPOSITORY

pytestmark = pytest.mark.distributed
TRAIN = "linclip_launch.train"
REMOTE_JOB = "helpers.remote_job"
SHARDS = "{00000..00007}.tar"
#: Two image sizes besides the model's own, one of them not square.
RUN = [
    *("train.steps=12", "optim.warmup_steps=2", "checkpoint.every_steps=12", "log.every_steps=1"),
    *("eval.data=null", "train.global_batch_size=32", "data.shuffle_shards=2", "data.num_lanes=2"),
    "data.resolutions=[{from_step: 0, image_size: 16}, {from_step: 4, image_size: 32}, "
    "{from_step: 8, image_size: [24, 40]}]",
    "data.network.backoff=0.05",
]
EXACT = ["train/loss", "train/grad_norm", "train/logit_scale"]


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class FlakyFiles(SimpleHTTPRequestHandler):
    """Serves a folder; every third request for a tar fails, in turn with 503 and by a cut body."""

    asked: Counter[str]
    lock = threading.Lock()

    def do_GET(self) -> None:
        if not self.path.endswith(".tar"):
            return super().do_GET()
        with self.lock:
            self.asked[self.path] += 1
            turn = self.asked.total()
        if turn % 3 == 1:
            content = (Path(self.directory) / self.path.lstrip("/")).read_bytes()
            if turn % 2:
                self.send_error(503)
                return None
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return None
        return super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def http_server(digits) -> Iterator[tuple[str, Counter[str]]]:
    """Yield the URL of the shards and the number of requests for each."""
    asked: Counter[str] = Counter()
    handler = type("Handler", (FlakyFiles,), {"asked": asked})
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(handler, directory=str(digits / "train"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{SHARDS}", asked
    server.shutdown()


@pytest.fixture(scope="module")
def s3_url(digits) -> Iterator[str]:
    """Yield the URL of the shards in a bucket; endpoint and credentials are in the environment."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            environment.setenv(name, value)
        s3 = boto3.client("s3")
        s3.create_bucket(Bucket="digits")
        for shard in sorted((digits / "train").glob("*.tar")):
            s3.upload_file(str(shard), "digits", f"train/{shard.name}")
        sizes = {
            path.name.replace("_stats.json", ".tar"): json.loads(path.read_text())["successes"]
            for path in (digits / "train").glob("*_stats.json")
        }
        s3.put_object(Bucket="digits", Key="train/sizes.json", Body=json.dumps(sizes).encode())
        yield f"s3://digits/train/{SHARDS}"
    server.stop()


@pytest.fixture(scope="module")
def job(deepspeed_cpu, embedded_overrides, http_server, s3_url, tmp_path_factory):
    """Train three runs of two ranks; return their folder and output."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [["name=local"]]
    for name, url in (("http", http_server[0]), ("s3", s3_url)):
        runs.append([f"name={name}", f"data.train=['{url}']", f"data.cache.dir={folder}/{name}.d"])
    overrides = [*embedded_overrides, *RUN, f"output_dir={folder}"]
    done = deepspeed_cpu(REMOTE_JOB, EMBEDDED, json.dumps(runs), *overrides)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.mark.parametrize("store", ["http", "s3"])
def test_remote_run_equals_the_local_one(job, store):
    ours, local = records(job[0] / store), records(job[0] / "local")
    assert [[r[tag] for tag in EXACT] for r in ours] == [[r[tag] for tag in EXACT] for r in local]
    assert ours[-1]["data/skipped_samples"] == 0


def test_ranks_share_the_copies_of_a_failing_server(job, http_server):
    folder, done = job
    assert re.search(r"HTTP status 503|announced|ClientPayloadError", done.stderr)
    assert not list((folder / "http.d").glob("*.tmp"))
    # The ranks share the copies: 8 are fetched, each rank looks once, and a third of all fails.
    assert http_server[1].total() <= 18


def test_absent_credentials_end_the_run(s3_url, embedded_overrides, tmp_path, monkeypatch):
    """A process of its own has no client of the store yet."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    overrides = [*embedded_overrides, *RUN, f"output_dir={tmp_path}", f"data.train=['{s3_url}']"]
    command = [
        sys.executable,
        "-m",
        TRAIN,
        EMBEDDED,
        *overrides,
        f"data.cache.dir={tmp_path / 'cache'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(r"data\.train \(s3://digits.*\) cannot be reached: .*credentials", errors[0])
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}
