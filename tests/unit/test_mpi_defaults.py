"""Settings of Open MPI are given before it starts, and only where the user has none."""

from __future__ import annotations

from pathlib import Path

import pytest

from heatopt.comm._mpi_defaults import MPI_DEFAULTS, set_mpi_defaults

ALL = {f"OMPI_MCA_{name}": value for name, value in MPI_DEFAULTS}


def test_all_of_them(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    assert set_mpi_defaults(environ, tmp_path) == list(ALL)
    assert environ == ALL


@pytest.mark.parametrize("variable", ALL)
def test_the_environment_wins(variable: str, tmp_path: Path) -> None:
    environ = {variable: "mine"}
    assert variable not in set_mpi_defaults(environ, tmp_path)
    assert environ == ALL | {variable: "mine"}


def test_the_file_of_the_user_wins(tmp_path: Path) -> None:
    (tmp_path / ".openmpi").mkdir()
    (tmp_path / ".openmpi" / "mca-params.conf").write_text("# coll = x\nbtl_tcp_links=1\n\nbtl = self,sm\n")
    environ: dict[str, str] = {}
    set_mpi_defaults(environ, tmp_path)
    assert environ == {name: value for name, value in ALL.items() if name != "OMPI_MCA_btl_tcp_links"}


def test_user_without_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Containers often run as a number that nobody has, without HOME."""

    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    environ: dict[str, str] = {}
    assert set_mpi_defaults(environ) == list(ALL)


def test_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEATOPT_MPI_DEFAULTS", "0")
    environ: dict[str, str] = {}
    assert set_mpi_defaults(environ, tmp_path) == []
    assert environ == {}
    monkeypatch.setenv("HEATOPT_MPI_DEFAULTS", "no")
    with pytest.raises(ValueError, match="HEATOPT_MPI_DEFAULTS must be 0 or 1, got 'no'"):
        set_mpi_defaults(environ, tmp_path)
