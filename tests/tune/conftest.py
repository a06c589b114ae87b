import pytest

from moelora_kernels.kernels.common import configs


@pytest.fixture
def tiles_file(tmp_path, monkeypatch):
    """The path in MOELORA_TILES. No file was read yet."""
    path = tmp_path / "tiles.json"
    monkeypatch.setenv("MOELORA_TILES", str(path))
    monkeypatch.setattr(configs, "_tables", {})
    return path
