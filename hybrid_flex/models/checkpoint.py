"""Models on disk: ``config.json`` and ``model.safetensors``, nothing that can run code.

Loading looks before it leaps: names, shapes and dtypes of the file are compared with those the configuration asks for
while the model still has no memory (device "meta"); only a file that fits entirely is read.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hybrid_flex.models.config import HybridConfig

if TYPE_CHECKING:
    from hybrid_flex.models.language_model import HybridLanguageModel

CONFIG_FILE, WEIGHTS_FILE, MODEL_TYPE = "config.json", "model.safetensors", "hybrid_flex"
_OP = "from_pretrained"


def save(model: HybridLanguageModel, directory: str | os.PathLike[str]) -> None:
    """Write a model; each file is finished beside its place and renamed, the weights last."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {"model_type": MODEL_TYPE, **model.config.to_dict()}
    beside = directory / f"{CONFIG_FILE}.partial"
    beside.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(beside, directory / CONFIG_FILE)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    beside = directory / f"{WEIGHTS_FILE}.partial"
    save_file(tensors, beside, metadata={"format": "pt", "model_type": MODEL_TYPE})
    os.replace(beside, directory / WEIGHTS_FILE)


def load(
    cls: type[HybridLanguageModel], directory: str | os.PathLike[str], device: torch.device | str
) -> HybridLanguageModel:
    """Read a model; raises one FileNotFoundError or ValueError and loads nothing unless everything fits."""
    directory = Path(directory)
    config = _read_config(directory)
    with torch.device("meta"):
        model = cls(config)
    tensors = _read_tensors(directory, dict(model.state_dict()), device)
    model.load_state_dict(tensors, strict=True, assign=True)
    return model


def _read_config(directory: Path) -> HybridConfig:
    path = _existing(directory, CONFIG_FILE)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{_OP}: {path} must be a whole JSON file, got {error}") from error
    model_type = values.pop("model_type", None) if isinstance(values, dict) else None
    if model_type != MODEL_TYPE:
        raise ValueError(f"{_OP}: {path} must have model_type {MODEL_TYPE!r}, got {model_type!r}")
    try:
        return HybridConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{_OP}: {path} must describe a HybridConfig, got an error: {error}") from error


def _read_tensors(
    directory: Path, wanted: dict[str, torch.Tensor], device: torch.device | str
) -> dict[str, torch.Tensor]:
    path = _existing(directory, WEIGHTS_FILE)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            names = set(file.keys())
            missing, foreign = sorted(wanted.keys() - names), sorted(names - wanted.keys())
            if missing or foreign:
                raise ValueError(
                    f"{_OP}: {path} must hold the tensors of its config.json, got {len(missing)} missing "
                    f"{missing[:3]} and {len(foreign)} foreign {foreign[:3]}"
                )
            for name, tensor in wanted.items():
                shape = tuple(file.get_slice(name).get_shape())
                if shape != tuple(tensor.shape):
                    raise ValueError(f"{_OP}: {name} in {path} must be {tuple(tensor.shape)}, got shape {shape}")
            tensors = {name: file.get_tensor(name) for name in wanted}
    except SafetensorError as error:
        raise ValueError(f"{_OP}: {path} must be a whole safetensors file, got {error}") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{_OP}: {name} in {path} must be floating point, got {tensor.dtype}")
    return tensors


def _existing(directory: Path, name: str) -> Path:
    path = directory / name
    if not path.is_file():
        found = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else "no directory"
        raise FileNotFoundError(
            f"{_OP}: directory must hold {CONFIG_FILE} and {WEIGHTS_FILE} (only safetensors are read), got {found}"
            f" in {directory}"
        )
    return path
