"""Saved models from anywhere: whatever is in their files, they load right or are one line."""

import copy
import json
import pickle
import random
from pathlib import Path

import pytest
import torch
from examples import TINY
from safetensors.torch import load_file, save

import tokendial as td

SEED, CONFIGS, TENSORS = 7, 40, 15
BACKBONE = td.Backbone(name="vit_tiny_patch16_224", weights=None, args=TINY | {"depth": 2})
VALUES = (
    None, True, False, -1, 0, 1, 3, 7, 10**5, 10**30, -(10**30), 0.5, 1e308, float("nan"),
    float("inf"), "", "x", "../x", "local-dir:/x", "vit_small_patch16_224", "transformers.ViTModel",
    [], [1], [[]], [None], ["x"], [1e300] * 3, {}, {"name": "tome"}, {"x": {"y": []}},
)  # fmt: skip


def whole(folder):
    reduce, adapt = td.ToMe(r=4), td.AdaptFormer(dim=4)
    model = td.wrap(BACKBONE.create(), reduce=reduce, adapt=adapt, backbone=BACKBONE)
    model.reducer.trained_degrees = (0, 1, 2, 3, 4)
    model.save_pretrained(folder)


def measured(folder):
    model = td.wrap(BACKBONE.create(), reduce=td.DyT(), adapt=td.LoRA(rank=2), backbone=BACKBONE)
    count = len(model.degrees) - 1
    model.reducer.calibration = td.reduce.base.Calibration((0.5,) * count, (0.25,) * count)
    model.save_pretrained(folder)


def compensator(folder):
    model = td.wrap(BACKBONE.create(), reduce=td.ToMe(r=4), backbone=BACKBONE)
    td.Compensator.for_model(model, td.ToCom()).save_pretrained(folder)


def places(value, path=()):
    """The path of everything in plain JSON."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    found = [path] if path else []
    for key, item in inner:
        found += places(item, (*path, key))
    return found


def other_config(folder: Path, draw: random.Random) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    *way, last = draw.choice(places(config))
    holder = config
    for key in way:
        holder = holder[key]
    match draw.randrange(6):
        case 0:
            del holder[last]
        case 1 if isinstance(holder, dict):
            holder[f"{last}_"] = holder.pop(last)
        case 2 if isinstance(holder, dict):
            holder[draw.choice(["extra", "checkpoint_path", "pretrained"])] = draw.choice(VALUES)
        case 3:
            holder[last] = "NEST"
        case _:
            holder[last] = copy.deepcopy(draw.choice(VALUES))
    text = json.dumps(config).replace('"NEST"', "[" * 100_000 + "]" * 100_000)
    path.write_text(text[: draw.randrange(len(text))] if draw.random() < 0.05 else text)


def other_tensors(folder: Path, draw: random.Random) -> None:
    path = folder / "model.safetensors"
    tensors, data = load_file(path), bytearray(path.read_bytes())
    name = draw.choice(sorted(tensors))
    value = tensors[name]
    match draw.randrange(8):
        case 0:
            data = data[: draw.randrange(len(data))]
        case 1:
            data[draw.randrange(400)] ^= 1 << draw.randrange(8)
        case 2:
            data = save({n: t for n, t in tensors.items() if n != name})
        case 3:
            data = save(
                tensors | {draw.choice(["extra", "vit.extra", "adapter.extra"]): value.clone()}
            )
        case 4:
            data = save(tensors | {name: value.new_zeros(*value.shape, 2)})
        case 5:
            data = save(tensors | {name: value.flatten()[:-1].clone()})
        case 6:
            kind = draw.choice([torch.bool, torch.int64, torch.uint8, torch.complex64])
            data = save(tensors | {name: value.to(kind)})
        case _:
            value.view(-1)[draw.randrange(value.numel())] = draw.choice([torch.nan, -torch.inf])
            data = save(tensors)
    path.write_bytes(data)


def says(written, read) -> bool:
    """Whether what was written anew holds all that was read."""
    if isinstance(read, dict) and isinstance(written, dict):
        return all(says(written.get(key), value) for key, value in read.items())
    return written == read


@pytest.mark.parametrize("change", [other_config, other_tensors])
@pytest.mark.parametrize("write", [whole, measured, compensator])
def test_a_changed_file_loads_right_or_is_one_line(tmp_path, write, change):
    load = td.Compensator.from_pretrained if write is compensator else td.load
    write(tmp_path / "saved")
    kept = {path: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    draw = random.Random(SEED)
    loaded = 0
    for _ in range(CONFIGS if change is other_config else TENSORS):
        for path, content in kept.items():
            path.write_bytes(content)
        change(tmp_path / "saved", draw)
        problem = ""
        try:
            model = load(tmp_path / "saved")
        except ValueError as error:
            problem = str(error)
        assert "\n" not in problem
        if problem:
            continue
        loaded += 1
        model.save_pretrained(tmp_path / "again")
        read, written = (
            json.loads((tmp_path / f / "config.json").read_text()) for f in ("saved", "again")
        )
        assert says(written, {key: read[key] for key in read.keys() & written.keys()})
        both = [load_file(tmp_path / f / "model.safetensors") for f in ("saved", "again")]
        assert both[0].keys() == both[1].keys()
        assert all(torch.equal(both[0][name].float(), both[1][name].float()) for name in both[0])
    assert loaded < 20


class Trap:
    """Runs when it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self):
        return Path.touch, (self.sprung,)


@pytest.fixture
def trap(tmp_path):
    """A folder of files that run code where they are unpickled, and the file that would be made."""
    folder, sprung = tmp_path / "trap", tmp_path / "sprung"
    folder.mkdir()
    torch.save({"model": {"patch_embed.proj.weight": Trap(sprung)}}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").write_bytes(pickle.dumps(Trap(sprung)))
    (folder / "plain.pkl").write_bytes(pickle.dumps(Trap(sprung)))
    (folder / "config.json").write_text(json.dumps({"architecture": BACKBONE.name}))
    yield folder
    assert not sprung.exists()


def test_the_trap_works(trap, tmp_path):
    pickle.loads((trap / "plain.pkl").read_bytes())
    assert (tmp_path / "sprung").exists()
    (tmp_path / "sprung").unlink()


FILES = ("pytorch_model.bin", "model.safetensors", "plain.pkl", ".")
PLACES = [{"weights": file} for file in FILES]
PLACES += [{"args": {"checkpoint_path": file}} for file in FILES]
PLACES += [
    {"weights": "pretrained", "args": {"pretrained_cfg": {"file": "pytorch_model.bin"}}},
    {"weights": "pretrained", "args": {"pretrained_cfg_overlay": {"file": "pytorch_model.bin"}}},
    {"weights": "pretrained", "name": "local-dir:"},
    {"weights": ".", "name": "transformers.ViTModel"},
]


def at(folder, value):
    """The settings with the places in them made absolute."""
    if isinstance(value, dict):
        return {key: at(folder, inner) for key, inner in value.items()}
    return (
        f"{value}{folder}"
        if value.endswith(":")
        else str(folder / value)
        if value in FILES
        else value
    )


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("saved", [True, False])
def test_nothing_is_unpickled(tmp_path, trap, place, saved):
    settings = {"name": BACKBONE.name, "weights": None, "args": {}} | at(trap, place)
    if saved and place.get("weights") != "pretrained":
        td.wrap(BACKBONE.create(), adapt=td.BitFit()).save_pretrained(tmp_path / "saved")
        path = tmp_path / "saved" / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"backbone": settings, "whole": False}))
        with pytest.raises(ValueError, match="[^\n]+"):
            td.load(tmp_path / "saved")
    else:
        with pytest.raises(ValueError, match="[^\n]+"):
            td.Backbone(**settings).create()


@pytest.mark.parametrize("file", FILES[:-1])
def test_nothing_is_unpickled_by_what_reads_files(trap, file):
    with pytest.raises(ValueError, match="needs pickled objects|is damaged or not a weight file"):
        td.convert_weights(trap / file, BACKBONE)
    (trap / "config.json").write_text(json.dumps({"format": 1, "kind": "compensator"}))
    with pytest.raises(ValueError, match="cannot be read"):
        td.Compensator.from_pretrained(trap)


def test_a_saved_model_does_not_say_where_else_to_read(tmp_path):
    whole(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for name in ("hf-hub:someone/model", "local-dir:/x", "../x"):
        path.write_text(json.dumps(config | {"backbone": config["backbone"] | {"name": name}}))
        with pytest.raises(
            ValueError, match=f"backbone.name '{name}' is a place, which is not read"
        ):
            td.load(tmp_path)
