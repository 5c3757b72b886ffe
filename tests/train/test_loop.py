import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from examples import tiny_vit
from safetensors.torch import load_file
from torch import nn
from zoo import backbone

import tokendial
import tokendial as td
from tokendial.runs import Run, read_recipe
from tokendial.runs.new_model import build_model
from tokendial.runs.recipe import TrainSection
from tokendial.signals import stop_requests
from tokendial.train import InterruptedRunError, train
from tokendial.train.fine_tuning import FineTuning
from tokendial.train.optimizer import cosine_schedule, parameter_groups

# All settings that use random numbers or keep state: a resumed run must restore each of them.
HARD = [
    "train.epochs=3",
    "train.workers=2",
    "train.ema=0.9",
    "train.accumulate=2",
    "train.batch_size=10",
    "train.clip_grad=1.0",
    "train.checkpoint_every=4",
    "model.drop_path=0.2",
    "augment.flip=0.5",
    "augment.mixup=0.8",
    "augment.cutmix=1.0",
    "augment.erasing=0.5",
    "augment.randaugment=rand-m9-mstd0.5-inc1",
]


def weights(run: Run, which: str = "last") -> dict[str, torch.Tensor]:
    return load_file(run.folder / which / "model.safetensors")


def learnt(run: Run) -> list[dict[str, float]]:
    """The records of a run without the value that depends on the machine."""
    return [{n: v for n, v in line.items() if n != "data_wait"} for line in run.metrics()]


def test_a_run_learns_and_writes_all_its_files(run):
    metrics = run.metrics()
    assert [line["epoch"] for line in metrics] == list(range(1, 9))
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"]
    assert run.classes() == ("digit 0", "digit 1", "digit 2", "digit 3")
    assert list((run.folder / "logs").rglob("events*"))
    assert run.recipe().train.epochs == 8
    best = max(line["val_accuracy"] for line in metrics)
    assert best > 0.5
    td.load(run.best)
    td.load(run.last)


def command(recipe_file: Path, output: Path) -> list[str]:
    code = "from tokendial.cli import main; main()"
    return [sys.executable, "-c", code, "train", str(recipe_file), f"output={output}", *HARD]


def environment() -> dict[str, str]:
    source = str(Path(tokendial.__file__).parent.parent)
    return os.environ | {"PYTHONPATH": source, "PYTHONWARNINGS": "ignore"}


def test_a_run_killed_in_mid_epoch_ends_with_the_same_bits(recipe_file, tmp_path):
    alone = train(read_recipe(recipe_file, [*HARD, f"output={tmp_path / 'alone'}"]), quiet=True)
    killed = Run(tmp_path / "killed")
    process = subprocess.Popen(command(recipe_file, killed.folder), env=environment())
    # Updates 4, 8, 12 (end of epoch 1), 16: the second epoch is under way.
    deadline = time.monotonic() + 240
    while not (killed.checkpoints / "update-00000016.pt").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert [line["epoch"] for line in killed.metrics()] == [1]
    # The number of loading processes does not matter either.
    overrides = [*HARD, f"output={killed.folder}", "train.workers=0"]
    train(read_recipe(recipe_file, overrides), quiet=True)
    for which in ("last", "best"):
        expected = weights(alone, which)
        assert all(torch.equal(w, expected[n]) for n, w in weights(killed, which).items())
    assert learnt(killed) == learnt(alone)


def test_a_run_stopped_by_a_signal_is_resumed_to_the_same_bits(recipe_file, tmp_path, monkeypatch):
    alone = train(read_recipe(recipe_file, [f"output={tmp_path / 'alone'}"]), quiet=True)
    recipe = read_recipe(recipe_file, [f"output={tmp_path / 'stopped'}"])
    from tokendial.train import fine_tuning

    evaluate = fine_tuning.evaluate_loader

    def ask_to_stop(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(fine_tuning, "evaluate_loader", ask_to_stop)
        with pytest.raises(InterruptedRunError):
            train(recipe, quiet=True)
    run = train(recipe, quiet=True)
    expected = weights(alone)
    assert all(torch.equal(w, expected[n]) for n, w in weights(run).items())


def test_a_checkpoint_with_other_parameter_groups_can_be_resumed(recipe_file, tmp_path, capsys):
    run = train(read_recipe(recipe_file, [f"output={tmp_path / 'run'}"]), quiet=True)
    newest, before = sorted(run.checkpoints.iterdir(), reverse=True)
    newest.unlink()
    shutil.rmtree(run.last)
    state = torch.load(before, weights_only=True)
    one, other = state["optimizer"]["param_groups"]
    one["params"], other["params"] = one["params"] + other["params"][:1], other["params"][1:]
    torch.save(state, before)
    train(read_recipe(recipe_file, [f"output={run.folder}"]))
    assert "the optimizer's moments start from zero" in capsys.readouterr().out
    assert run.last.exists()


def test_a_model_that_is_evaluated_once_is_the_last_one(recipe_file, tmp_path):
    overrides = [f"output={tmp_path / 'once'}", "train.epochs=2", "train.evaluate=last"]
    once = train(read_recipe(recipe_file, overrides), quiet=True)
    first, last = once.metrics()
    assert not any(name.startswith("val_") for name in first)
    assert once.best_record() == last
    assert last["val_accuracy"] > 0
    best = weights(once, "best")
    assert all(torch.equal(w, best[n]) for n, w in weights(once).items())


def test_a_run_on_a_few_images_of_each_class_knows_them_later(recipe_file, tmp_path):
    few = ["train.images_per_class=6", f"output={tmp_path / 'few'}", "train.epochs=1"]
    run = train(read_recipe(str(recipe_file), few), quiet=True)
    seen = run.data()
    assert len(seen.train) == 6 * 4
    assert seen.train.indices == FineTuning(run.recipe()).data.train.indices
    assert len(seen.val) == 4 * 20


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGXCPU"])
def test_blocks_inside_each_other_are_all_asked_to_stop(name):
    with stop_requests() as outer:
        with stop_requests() as inner:
            os.kill(os.getpid(), getattr(signal, name))
            assert inner.requested
        assert outer.requested
        with stop_requests() as later:
            assert later.requested
    with stop_requests() as fresh:
        assert not fresh.requested


def test_a_closed_terminal_does_not_stop_a_process_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_folder_of_a_process_killed_inside_claim_is_free(recipe_file, tmp_path):
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    run.classes_file.write_text("{}")
    (run.folder / ".recipe.yaml.x3f").write_text("seed:")
    run.claim(read_recipe(recipe_file), ["a", "b"])
    assert run.classes() == ("a", "b")


def test_a_run_stopped_at_the_end_of_an_epoch_still_evaluates_it(
    recipe_file, tmp_path, monkeypatch
):
    recipe = read_recipe(recipe_file, [f"output={tmp_path / 'run'}", "train.epochs=1"])
    before_update = FineTuning.before_update

    def ask_to_stop(job, update, updates_per_epoch):
        if update == updates_per_epoch - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        before_update(job, update, updates_per_epoch)

    with monkeypatch.context() as patched:
        patched.setattr(FineTuning, "before_update", ask_to_stop)
        with pytest.raises(InterruptedRunError):
            train(recipe, quiet=True)
    assert [line["epoch"] for line in train(recipe, quiet=True).metrics()] == [1]


def test_a_finished_run_is_left_alone(run):
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    train(run.recipe(), quiet=True)
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == before


def test_another_run_is_not_overwritten(run, recipe_file):
    other = read_recipe(recipe_file, [f"output={run.folder}", "train.lr=0.5"])
    with pytest.raises(ValueError, match=r"holds another run: its train.lr is 0.003, not 0.5"):
        train(other, quiet=True)


def test_a_run_without_a_new_field_matches_the_same_recipe_with_its_default(
    run, recipe_file, tmp_path
):
    folder = tmp_path / "old"
    shutil.copytree(run.folder, folder)
    written = yaml.safe_load((folder / "recipe.yaml").read_text())
    del written["dense"], written["decode"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(written))
    assert train(read_recipe(recipe_file, [f"output={folder}"]), quiet=True).metrics()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(written | {"loss": "distillation"}))
    with pytest.raises(ValueError, match=r"holds another run \(loss is not a field of a recipe"):
        train(read_recipe(recipe_file, [f"output={folder}"]), quiet=True)


def test_a_folder_with_other_files_is_not_used(recipe_file, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        train(read_recipe(recipe_file, [f"output={tmp_path}"]), quiet=True)


def test_a_broken_training_image_is_named(recipe_file, digits, tmp_path):
    shutil.copytree(digits, tmp_path / "digits")
    broken = tmp_path / "digits" / "train" / "digit 1" / "5.png"
    broken.write_bytes(broken.read_bytes()[:60])
    recipe = read_recipe(
        recipe_file, [f"output={tmp_path / 'run'}", f"data.root={tmp_path / 'digits'}"]
    )
    with pytest.raises(ValueError, match=r"digit 1/5\.png cannot be decoded"):
        train(recipe, quiet=True)


def test_a_loss_that_explodes_says_what_to_do(recipe_file, tmp_path):
    recipe = read_recipe(recipe_file, [f"output={tmp_path / 'run'}", "train.lr=1e30"])
    with pytest.raises(ValueError, match="the loss is not finite at update .*: lower train.lr"):
        train(recipe, quiet=True)


@pytest.mark.parametrize("overrides", [["augment.mixup=0.5"], ["augment.smoothing=0.1"]])
def test_several_labels_cannot_be_mixed(tmp_path, overrides):
    recipe = read_recipe(
        "pretrain_scenes",
        [f"output={tmp_path / 'run'}", "data.items=shipped", "model.weights=null", *overrides],
    )
    with pytest.raises(ValueError, match="mixup, cutmix and smoothing need one label"):
        train(recipe, quiet=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sparse_tuning_with_several_labels_trains(tmp_path, precision):
    recipe = read_recipe(
        "demo",
        [
            f"output={tmp_path / 'run'}",
            "data={name: scenes, task: present, train_size: 8, val_size: 40}",
            "model.weights=null",
            "train.epochs=1",
            "train.batch_size=4",
            f"train.precision={precision}",
            "train.degree=5",
        ],
    )
    run = train(recipe, quiet=True)
    assert set(run.metrics()[0]) >= {"val_accuracy", "val_mean_average_precision"}
    assert run.model().degree == 5


def test_the_rate_warms_up_to_its_peak_and_falls_to_its_end():
    parameter = torch.nn.Parameter(torch.zeros(1))
    settings = TrainSection(epochs=4, lr=0.1, min_lr=0.01, warmup_epochs=1)
    optimizer = torch.optim.SGD([parameter], lr=settings.lr)
    schedule = cosine_schedule(optimizer, settings, updates_per_epoch=10)
    rates = []
    for update in range(41):
        schedule.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == 0.0
    assert rates[5] == pytest.approx(0.05)
    assert rates[10] == max(rates) == pytest.approx(0.1)
    assert rates[25] == pytest.approx(0.055)
    assert rates[40] == pytest.approx(0.01)


def test_only_matrices_decay(recipe_file):
    model = build_model(read_recipe(recipe_file), 4)
    plain, decayed = parameter_groups(model, 0.05, 1e-3)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"])
    exempt = {id(p) for p in plain["params"]}
    assert {id(model.vit.pos_embed), id(model.vit.cls_token), id(model.vit.head.bias)} <= exempt


def test_everything_decays_if_the_recipe_says_so(recipe_file):
    recipe = read_recipe(recipe_file, ["train.decay=all"])
    assert recipe.train.decay == "all"
    model = build_model(recipe, 4)
    (decayed,) = parameter_groups(model, 0.05, 1e-3, vector_decay=0.05)
    assert decayed["weight_decay"] == 0.05
    assert {id(p) for p in decayed["params"]} == {id(p) for p in model.trainable_parameters()}
    with pytest.raises(ValueError, match="'matrices' or 'all'"):
        read_recipe(recipe_file, ["train.decay=none"])


def test_the_rate_of_the_backbone_falls_towards_the_input(vit):
    model = td.wrap(vit, adapt=td.FullFineTuning())
    groups = parameter_groups(model, 0.05, lr=1.0, layer_decay=0.5)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates[id(vit.head.weight)] == 1.0
    assert rates[id(vit.norm.weight)] == 0.5
    of_blocks = [rates[id(block.mlp.fc1.weight)] for block in vit.blocks]
    assert of_blocks == [1 / 16, 1 / 8, 1 / 4, 1 / 2]
    assert rates[id(vit.patch_embed.proj.weight)] == rates[id(vit.pos_embed)] == 1 / 32


VECTORS = {
    "vit": {"cls_token", "pos_embed"},
    "deit distilled": {"cls_token", "dist_token", "pos_embed"},
    "dinov2 registers": {"cls_token", "reg_token", "pos_embed"},
    "siglip": {"pos_embed", "attn_pool.latent"},
    "rope mixed": {"rope.freqs"},
    "hf deit": {"deit.embeddings.distillation_token", "deit.embeddings.cls_token"},
    "hf dinov2 registers": {"dinov2_with_registers.embeddings.register_tokens"},
    "hf clip": {"embeddings.position_embedding.weight"},
}


@pytest.mark.parametrize("name", VECTORS)
def test_weights_of_layers_decay_and_vectors_of_any_shape_do_not(name):
    vit = backbone(name)[0]
    decayed = decaying(td.wrap(vit, adapt=td.FullFineTuning()))
    decayed = {n for n, parameter in vit.named_parameters() if id(parameter) in decayed}
    layers = {n for n, m in vit.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert decayed == {f"{layer}.weight" for layer in layers}
    vectors = {n for n, _ in vit.named_parameters()} - decayed
    assert vectors >= VECTORS[name] | getattr(vit, "no_weight_decay", set)() & {*vit.state_dict()}


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        ({"adapt": td.VPT()}, set()),
        ({"adapt": td.SSF()}, set()),
        ({"adapt": td.FacT(rank=2)}, {"left.weight", "right.weight", "cores"}),
        ({"adapt": td.FacT(rank=2, kind="tk")}, {"left.weight", "right.weight", "cores", "mix"}),
    ],
)
def test_prompts_and_scales_do_not_decay_but_matrices_of_adapters_do(parts, names):
    model = td.wrap(tiny_vit(), **parts)
    expected = {id(model.adapter.get_parameter(name)) for name in names}
    assert decaying(model) == {id(model.vit.head.weight)} | expected


def test_matrices_of_peft_decay_and_its_vectors_do_not():
    for method, count in (("loha", 4), ("ia3", 0)):
        options = {"r": 2} if method == "loha" else {"feedforward_modules": []}
        model = td.wrap(tiny_vit(depth=1), adapt=td.PEFT(method=method, options=options))
        assert len(decaying(model) - {id(model.vit.head.weight)}) == count


def test_queries_of_video_and_of_decoders_do_not_decay():
    video = td.wrap(td.video_vit(tiny_vit(), frames=2, num_classes=3), adapt=td.LinearProbe())
    dense = td.wrap(tiny_vit(num_classes=0), decode=td.MaskTransformer(), adapt=td.LinearProbe())
    assert id(video.vit.head.query) not in decaying(video)
    assert id(video.vit.head.q.weight) in decaying(video)
    assert id(dense.decoder.classes) not in decaying(dense)
    assert id(dense.decoder.project.weight) in decaying(dense)


def decaying(model):
    """The ids of the parameters with weight decay."""
    groups = parameter_groups(model, 0.05, lr=1.0)
    return {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
