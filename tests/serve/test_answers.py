"""Whatever an image was batched with, its answer is that of the offline model at its degree."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import picture, serving

from benchmarks.answers import Offline, compare_answers, random_requests, send_all


@pytest.mark.parametrize("names", [("pets", "cars"), ("masks",)], ids=" and ".join)
def test_mixed_requests_get_the_answers_of_the_offline_model(names, request):
    runs = {name: request.getfixturevalue(name) for name in names}
    images = [picture(seed, (40 + seed, 30)) for seed in range(12)]
    offline = {name: Offline(run, images) for name, run in runs.items()}
    with serving(runs, own_process=True, max_batch=16) as server, ThreadPoolExecutor(1) as client:
        url = f"http://127.0.0.1:{server.port}/v1/predict"
        degrees = [row["degree"] for row in server.ask("/v1/degrees").json["degrees"]]
        requests = random_requests(list(runs), degrees, images=len(images), requests=48, seed=0)
        with server.busy():  # until all of them wait, so that batches mix
            done = client.submit(send_all, url, requests, offline, clients=len(requests))
            while server.engine.status().queued < sum(len(some.images) for some in requests):
                assert not done.done(), done.result()
                time.sleep(0.01)
        rows = compare_answers(done.result(), offline)
    assert {row["what"].partition(", ")[0] for row in rows} == set(runs)
    assert sum(row["images"] for row in rows) == sum(len(some.images) for some in requests)
    assert sum(row["wrong"] for row in rows) == 0
    assert max(row["batch"] for row in rows) > 8
    assert len({degree for row in rows for degree in row["degrees"]}) > 3
