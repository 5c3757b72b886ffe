import pytest
import torch
from examples import images, tiny_vit

import tokendial as td
from tokendial.measure import ShareMeter


def dialled(method=td.DAR, **settings):
    """A model with random dispatchers, so that they give tokens different logits."""
    torch.manual_seed(0)
    model = td.wrap(tiny_vit(), reduce=method(**settings)).eval()
    for dispatcher in model.reducer.dispatchers:
        torch.nn.init.normal_(dispatcher.weight, std=0.5)
        torch.nn.init.constant_(dispatcher.bias, 0.3)
    return model


def share_at(model, degree, batch):
    """Share of the selected tokens, from the masks in `Tokens.selected`."""
    model.set_degree(degree)
    with torch.no_grad():
        masks = [t.selected[:, t.prefix :] for t in model.forward_pass(batch).tokens]
    return float(torch.stack(masks).mean())


@pytest.mark.parametrize("method", [td.DAR, td.DyT])
@pytest.mark.parametrize("target", [0.5, 0.35])
def test_a_calibrated_dial_gives_the_shares_that_it_tells(method, target):
    model, batch = dialled(method, target_ratio=target), images(8)
    trained = share_at(model, model.reducer.degree, batch)
    found = td.calibrate(model, batch.split(3))
    shares = [share_at(model, degree, batch) for degree in model.degrees[1:]]
    assert list(found.shares) == pytest.approx(shares, abs=1e-6)
    assert found.shares[model.reducer.degree - 1] == pytest.approx(trained, abs=1e-6)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.75
    assert shares[-1] < 0.25


def test_the_trained_degree_keeps_its_published_threshold():
    model = dialled(target_ratio=0.4)
    assert model.reducer.threshold(model.degree) == 0.0
    assert td.calibrate(model, [images(4)]).thresholds[model.degree - 1] == 0.0


def test_without_calibration_thresholds_rise_with_the_degree():
    reducer = dialled().reducer
    thresholds = [reducer.threshold(degree) for degree in reducer.degrees[1:]]
    assert thresholds == sorted(thresholds)
    # At rate 0.1 noise of training selects a logit of 0 with probability 0.1.
    assert torch.tensor(-thresholds[-1]).sigmoid() == pytest.approx(0.1)


def test_costs_are_those_of_the_measured_shares():
    model = dialled()
    nominal, target = model.cost().macs, model.degree
    found = td.calibrate(model, [images(4)])
    ffn = (model.cost(0).macs - nominal) / 0.5
    expected = model.cost(0).macs - ffn * (1 - found.shares[target - 1])
    assert model.cost().macs == pytest.approx(expected, rel=0.01)


def test_calibration_is_saved_and_leaves_the_model_as_it_was(tmp_path):
    model = dialled(td.DyT)
    model.set_degree(2)
    model.train()
    td.calibrate(model, [images(2)])
    assert model.degree == 2
    assert model.training
    model.save_pretrained(tmp_path)
    loaded = td.load(tmp_path, tiny_vit())
    assert loaded.reducer.calibration == model.reducer.calibration
    assert torch.equal(loaded(images(2)), model.eval()(images(2)))


def test_each_named_adapter_has_its_own_calibration(tmp_path):
    vit = tiny_vit()
    model = td.wrap(vit, reduce=td.DyT(), adapt=td.AdaptFormer(dim=4)).eval()
    model.add_adapter("other", td.AdaptFormer(dim=4))
    model.set_adapter("other")
    found = td.calibrate(model, [images(2)])
    model.save_adapter("other", tmp_path)
    model.load_adapter("again", tmp_path)
    model.set_adapter("again")
    assert model.reducer.calibration == found
    model.set_adapter("default")
    assert model.reducer.calibration is None


def test_a_meter_counts_only_what_runs_inside():
    model, batch = dialled(), images(4)
    model(batch)
    with ShareMeter(model) as meter, torch.no_grad():
        model(batch)
    assert meter.share == pytest.approx(share_at(model, model.degree, batch), abs=1e-6)
    model.set_degree(0)
    with meter:
        model(batch)
    assert meter.share == 1.0


@pytest.mark.parametrize(
    "reduce", [None, td.ToMe(r=2), td.DAR(selection="topk"), td.DyT(target_ratio=1.0)]
)
def test_other_models_cannot_be_calibrated(reduce):
    model = td.wrap(tiny_vit(), reduce=reduce)
    with pytest.raises(ValueError, match="must select tokens by threshold: use DyT or DAR"):
        td.calibrate(model, [images(1)])


def test_no_images_raise():
    with pytest.raises(ValueError, match="batches must hold at least one image, got none"):
        td.calibrate(dialled(), [])
