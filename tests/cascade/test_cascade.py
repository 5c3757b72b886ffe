import json

import pytest
import torch
from examples import images, perturbed, tiny_vit

import tokendial as td


@pytest.fixture
def model():
    return perturbed(td.wrap(tiny_vit(), reduce=td.ToMe(r=12)), std=0.1)


def batches(count=600):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 32, 32, generator=draw).split(50)


@torch.no_grad()
def at(model, degree, pictures):
    model.set_degree(degree)
    return model(pictures)


def test_unsure_images_get_the_answer_of_the_next_degree(model):
    cascade = td.Cascade(model, (12, 4, 0))
    cascade.calibrate(batches(), max_changed=0.05)
    model.set_degree(3)
    pictures = images(40)
    found = cascade.answer(pictures)
    assert model.degree == 3
    assert len(set(found.degrees)) > 1
    for degree in set(found.degrees):
        some = [i for i, own in enumerate(found.degrees) if own == degree]
        torch.testing.assert_close(found.logits[some], at(model, degree, pictures)[some])
    torch.testing.assert_close(cascade(pictures), found.logits)


def test_without_calibration_the_last_degree_answers(model):
    pictures = images(5)
    found = td.Cascade(model, (8, 0)).answer(pictures)
    assert found.degrees == (0,) * 5
    torch.testing.assert_close(found.logits, at(model, 0, pictures))


def test_the_counted_share_is_what_the_cascade_changes(model):
    cascade = td.Cascade(model, (12, 0), score="entropy")
    found = cascade.calibrate(batches(), max_changed=0.1)
    pictures = torch.cat(batches())
    counted = torch.randperm(600, generator=torch.Generator().manual_seed(0))[120:]
    answered = cascade.answer(pictures)
    last = at(model, 0, pictures)
    changed = answered.logits.argmax(1) != last.argmax(1)
    assert int(changed[counted].sum()) == found.harmed
    sent_on = torch.tensor([degree == 0 for degree in answered.degrees])
    assert float(sent_on[counted].float().mean()) == pytest.approx(found.sent_on[0])
    assert 0 < found.sent_on[0] < 1


def test_lost_answers_are_those_that_the_last_degree_has_right(model):
    pictures = torch.cat(batches())
    first, last = (at(model, degree, pictures).argmax(1) for degree in (12, 0))
    # The labels are the last degree's answer, the first one's, or neither.
    labels = torch.stack([last, first, (last + 1) % 7])[torch.arange(600) % 3, torch.arange(600)]
    observations = td.Cascade(model, (12, 0)).observe([(pictures, labels)], "lost")
    assert torch.equal(observations.harmed[0], (first != labels) & (last == labels))
    with pytest.raises(ValueError, match="max_lost needs batches of images and labels"):
        td.Cascade(model, (12, 0)).calibrate([pictures], max_lost=0.1)


def test_masks_are_compared_by_overlap():
    decode = td.MaskTransformer(num_classes=2, dim=16, depth=1)
    model = perturbed(td.wrap(tiny_vit(num_classes=0), reduce=td.EViT(r=4), decode=decode), std=0.1)
    cascade = td.Cascade(model, (3, 0))
    found = cascade.calibrate(batches(200), max_changed=0.3)
    assert found.bound <= 0.3
    assert cascade(images(3)).shape == at(model, 0, images(3)).shape


def test_a_runtime_takes_the_place_of_the_model(model):
    pictures = torch.cat(batches(100))
    plain = td.Cascade(model, (8, 0))
    fast = td.Cascade(td.Runtime("onnxruntime").start(model, pictures[:8], degrees=[0, 8]), (8, 0))
    for cascade in (plain, fast):
        cascade.calibrate([pictures], max_changed=0.2)
    torch.testing.assert_close(fast(images(6)), plain(images(6)), atol=1e-4, rtol=0)
    assert fast.answer(images(6)).degrees == plain.answer(images(6)).degrees


def test_a_saved_cascade_answers_the_same(model, tmp_path):
    cascade = td.Cascade(model, (12, 0), score="probability")
    cascade.calibrate(batches(), max_changed=0.1)
    cascade.save(tmp_path / "cascade.json")
    loaded = td.Cascade.load(model, tmp_path / "cascade.json")
    assert loaded.stages == cascade.stages
    assert loaded.answer(images(9)).degrees == cascade.answer(images(9)).degrees


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"degrees": [99, 0]}, "degree must be an integer"),
        ({"score": "luck"}, "score must be one of margin, probability, entropy"),
        ({"calibration": {"thresholds": []}}, "is missing, or no field of a calibration"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(model, tmp_path, change, message):
    path = tmp_path / "cascade.json"
    td.Cascade(model, (12, 0)).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"holds no cascade.*: .*{message}"):
        td.Cascade.load(model, path)
    with pytest.raises(ValueError, match="there is no cascade; `tokendial cascade RUN` makes one"):
        td.Cascade.load(model, tmp_path / "none.json")


def test_a_cascade_of_other_weights_is_refused(model, tmp_path):
    path = tmp_path / "cascade.json"
    td.Cascade(model, (12, 0)).save(path, revision="abc")
    assert td.Cascade.load(model, path, revision="abc").stages.revision == "abc"
    assert td.Cascade.load(model, path).degrees == (12, 0)
    with pytest.raises(ValueError, match=r"cascade.json was calibrated for other weights; run"):
        td.Cascade.load(model, path, revision="abd")


def test_a_cascade_of_another_precision_is_refused(model, tmp_path):
    path = tmp_path / "cascade.json"
    plain, half = td.Runtime("onnxruntime").numerics, td.Runtime("openvino", "bf16").numerics
    td.Cascade(model, (12, 0)).save(path, numerics=half)
    assert td.Cascade.load(model, path, numerics=half).degrees == (12, 0)
    for other in (plain, td.Runtime("torch", "bf16").numerics):
        with pytest.raises(ValueError, match=f"calibrated in openvino bf16, not in {other}: ch"):
            td.Cascade.load(model, path, numerics=other)
    td.Cascade(model, (12, 0)).save(path)
    assert td.Cascade.load(model, path, numerics=plain).degrees == (12, 0)


@pytest.mark.parametrize("degrees", [(0,), (0, 8), (8, 8), (8, 4, 2, 0)])
def test_degrees_must_fall(model, degrees):
    with pytest.raises(ValueError, match="degrees must be two or three, the cheapest first"):
        td.Cascade(model, degrees)


def test_mistakes_are_named(model):
    cascade = td.Cascade(model, (8, 0))
    with pytest.raises(ValueError, match="either max_changed or max_lost"):
        cascade.calibrate(batches())
    with pytest.raises(ValueError, match="at least one batch of images, got none"):
        cascade.calibrate([], max_changed=0.1)
    headless = td.wrap(tiny_vit(num_classes=0), reduce=td.ToMe(r=4))
    with pytest.raises(ValueError, match="an embedding does not say how sure"):
        td.Cascade(headless, (4, 0))
