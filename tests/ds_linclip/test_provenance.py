"""The commit recorded with a result is that of the checkout the package runs from."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ds_linclip import provenance

pytestmark = pytest.mark.long

PRINT_COMMIT = "import provenance; print(provenance.commit_of(['measured.py']))"


def git(repository: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    command = ["git", *identity, *arguments]
    done = subprocess.run(command, cwd=repository, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one commit, which holds measured.py, and an untracked provenance.py."""
    git(tmp_path, "init", "--quiet")
    (tmp_path / "measured.py").write_text("")
    git(tmp_path, "add", "measured.py")
    git(tmp_path, "commit", "--quiet", "--message", "First")
    package = tmp_path / "site-packages"
    package.mkdir()
    shutil.copy(provenance.__file__, package)
    return tmp_path


def recorded_commit(repository: Path) -> str:
    """Return what the copied module records, in a process that imports nothing else of ours."""
    done = subprocess.run(
        [sys.executable, "-c", PRINT_COMMIT],
        cwd=repository / "site-packages",
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def test_installed_copy_does_not_record_the_commit_of_the_repository_around_it(repository):
    assert recorded_commit(repository) == "unknown"


def test_checkout_records_its_commit_and_whether_measured_files_changed(repository):
    git(repository, "add", "site-packages/provenance.py")
    git(repository, "commit", "--quiet", "--message", "Second")
    commit = git(repository, "rev-parse", "--short", "HEAD")
    assert recorded_commit(repository) == commit
    (repository / "other.py").write_text("changed = True\n")
    assert recorded_commit(repository) == commit
    (repository / "measured.py").write_text("changed = True\n")
    assert recorded_commit(repository) == f"{commit}-dirty"
