"""The page's parts, and the tokens of an image, over HTTP."""

import io
import threading
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from serving import file, form, picture, serving

from tokendial.show import token_maps

PNG = "image/png"


@pytest.fixture(scope="module")
def server(pets, cars):
    with serving({"pets": pets, "cars": cars}) as running:
        yield running


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/", "text/html"), ("/page/page.css", "text/css"), ("/page/page.js", "text/javascript")],
)
def test_the_page_may_load_nothing_from_elsewhere(server, path, kind):
    reply = server.ask(path)
    assert reply.status == 200
    assert reply.headers["content-type"] == f"{kind}; charset=utf-8"
    assert "default-src 'self';" in reply.headers["content-security-policy"]
    assert reply.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/page/", "/page/secret.txt", "/page/..%2Fapp.py"])
def test_there_is_nothing_else_beside_the_page(server, path):
    assert server.ask(path).status == 404


@pytest.mark.parametrize("name", ["pets", "cars"])
def test_the_tokens_are_those_of_the_offline_model(server, request, name):
    run = request.getfixturevalue(name)
    model = run.model()
    model.set_degree(3)
    seen = run.task().image_transform(model.anatomy)(picture())
    maps = token_maps(model, seen)
    view = server.ask(f"/v1/tokens?model={name}&degree=3", file(picture()), PNG).json
    assert (view["model"], view["degree"], view["prediction"]["degree"]) == (name, 3, 3)
    assert [layer["tokens"] for layer in view["layers"]] == list(maps.num_tokens)
    for layer, origin in zip(view["layers"], maps.origin, strict=True):
        assert layer["origin"] == origin.flatten().tolist()
    assert view["gmacs"] == pytest.approx(model.cost().gmacs)
    image = Image.open(io.BytesIO(b64decode(view["image"])))
    assert image.size == (view["width"], view["height"]) == (32, 32)
    assert np.ptp(np.asarray(image)) > 0


def test_the_prediction_is_that_of_predict(server):
    view = server.ask("/v1/tokens?degree=2", file(picture()), PNG).json
    answer = server.ask("/v1/predict?degree=2", file(picture()), PNG).json
    assert view["prediction"]["classes"] == answer["predictions"][0]["classes"]
    assert view["revision"] == answer["revision"]


def test_views_leave_predictions_as_they_are(server):
    before = server.predict(file(picture()), query="?model=pets&degree=1").json["predictions"]
    server.ask("/v1/tokens?model=cars&degree=4", file(picture()), PNG)
    after = server.predict(file(picture()), query="?model=pets&degree=1").json["predictions"]
    assert before[0]["classes"] == after[0]["classes"]


def test_a_view_of_tokens_is_for_one_image(server):
    reply = server.ask("/v1/tokens", *form(file(picture()), file(picture(1))))
    assert (reply.status, reply.error["code"]) == (413, "too_many_images")
    assert server.ask("/v1/tokens", *form(file(picture()))).status == 200


def test_concurrent_views_are_limited(server):
    with ThreadPoolExecutor(8) as pool:
        with server.busy():
            going = [pool.submit(server.ask, "/v1/tokens", file(picture()), PNG) for _ in range(8)]
            while server.engine.status().queued < 8:
                threading.Event().wait(0.01)
            refused = server.ask("/v1/tokens", file(picture()), PNG)
        assert (refused.status, refused.error["code"]) == (429, "full")
        assert int(refused.headers["retry-after"]) >= 1
        assert [each.result().status for each in going] == [200] * 8
    assert server.ask("/v1/tokens", file(picture()), PNG).status == 200


def test_a_server_that_stops_refuses_views(pets):
    with serving({"pets": pets}) as server:
        assert server.engine.drain(10)
        reply = server.ask("/v1/tokens", file(picture()), PNG)
    assert (reply.status, reply.error["code"]) == (503, "draining")
