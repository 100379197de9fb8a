"""Prices of node types: the file that comes with the program, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lungct_tune.config.prices import PricedCluster, PricesError, priced_cluster, read_prices, without_price

REPOSITORY = Path(__file__).parents[2]
LINE = "{on_demand: 1.0, spot: 0.4, gpu: L4, gpus: 1, looked_up: today}"


@pytest.fixture
def prices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of prices in the working folder, which is used first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clusters").mkdir()
    return tmp_path / "clusters" / "prices.yaml"


def test_all_node_types_of_the_cluster_files_have_a_price_with_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # without a file of its own
    found = read_prices()
    assert found is not None
    _, known = found
    for file in ("cluster.yaml", "clusters/gcp.yaml"):
        cluster = priced_cluster(REPOSITORY / file)
        assert cluster is not None and cluster.workers and not without_price(cluster, known)
    assert all("check before use" in price.looked_up for price in known.node_types.values())
    assert all(price.spot is None or price.spot < price.on_demand for price in known.node_types.values())


def test_own_machines_have_no_prices() -> None:
    assert priced_cluster(REPOSITORY / "clusters" / "onprem.yaml") is None
    assert priced_cluster(REPOSITORY / "no such file.yaml") is None


def test_an_hour_costs_the_head_and_the_workers_on_spot_or_on_demand(prices: Path) -> None:
    types = dict.fromkeys(("g6.xlarge", "m7i.xlarge"), LINE)
    prices.write_text("currency: dollars\nnode_types:\n" + "".join(f"  {k}: {v}\n" for k, v in types.items()))
    found, cluster = read_prices(), priced_cluster(REPOSITORY / "cluster.yaml")
    assert found is not None and cluster is not None and found[0] == Path("clusters/prices.yaml")
    assert cluster.hourly(found[1], 3) == pytest.approx((1 + 3 * 0.4, 1 + 3 * 1.0))


def _cluster(tmp_path: Path, limits: str, *of_types: str) -> PricedCluster | None:
    """The cluster of cluster.yaml with other limits: of all workers, of on-demand and of spot ones."""
    config = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())
    del config["max_workers"]
    for kind, limit in zip(("gpu-on-demand", "gpu-spot"), of_types, strict=False):
        config["available_node_types"][kind] |= yaml.safe_load(limit)
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(config | yaml.safe_load(limits)))
    return priced_cluster(tmp_path / "cluster.yaml")


def test_no_more_workers_are_paid_for_than_ray_would_start(prices: Path, tmp_path: Path) -> None:
    """Found: a file without max_workers had none, and the limit of a type did not count."""
    types = dict.fromkeys(("g6.xlarge", "m7i.xlarge"), LINE)
    prices.write_text("currency: dollars\nnode_types:\n" + "".join(f"  {k}: {v}\n" for k, v in types.items()))
    found, by_default, limited = (
        read_prices(),
        _cluster(tmp_path, "{}"),
        _cluster(tmp_path, "{max_workers: 9}", "{max_workers: 1}", "{max_workers: 2}"),
    )
    assert found is not None and by_default is not None and limited is not None
    assert by_default.most_workers == 2 and limited.most_workers == 3
    assert limited.hourly(found[1], 3) == pytest.approx((1 + 2 * 0.4 + 1.0,) * 2)
    assert limited.hourly(found[1], 2) == pytest.approx((1 + 2 * 0.4, 1 + 0.4 + 1.0))


@pytest.mark.parametrize("limits", ["{max_workers: '4'}", "{max_workers: -1}", "{max_workers: 2.5}"])
def test_a_cluster_file_that_ray_refuses_has_no_price(tmp_path: Path, limits: str) -> None:
    assert _cluster(tmp_path, limits) is None


def test_a_type_without_a_price_is_named(prices: Path) -> None:
    prices.write_text(f"currency: dollars\nnode_types: {{m7i.xlarge: {LINE}}}\n")
    found, cluster = read_prices(), priced_cluster(REPOSITORY / "cluster.yaml")
    assert found is not None and cluster is not None and without_price(cluster, found[1]) == ["g6.xlarge"]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("currency: dollars", "node_types"),
        ("node_types: {}", "currency"),
        ("currency: dollars\nnode_types: {a: {on_demand: -1, looked_up: x}}", "node_types.a.on_demand"),
        ("currency: dollars\nnode_types: {a: {on_demand: '1', looked_up: x}}", "node_types.a.on_demand"),
        ("currency: dollars\nnode_types: {a: {on_demand: .nan, looked_up: x}}", "node_types.a.on_demand"),
        ("currency: dollars\nnode_types: {a: {on_demand: 1}}", "node_types.a.looked_up"),
        ("currency: dollars\nnode_types: {a: {on_demand: 1, looked_up: x, per_day: 2}}", "node_types.a.per_day"),
        ("currency: dollars\nnode_types: {a: 1.5}", "node_types.a: expected KEY: VALUE, found 1.5"),
        ("currency: dollars\nnode_types: {a: {on_demand: 1, gpu: L4, looked_up: x}}", "node_types.a: gpu and gpus"),
        ("currency: dollars\nnode_types: {a: {on_demand: 1, gpus: 1, looked_up: x}}", "give both, or neither"),
        ("", "expected the keys currency and node_types"),
        ("currency: dollars\ncurrency: euros\nnode_types: {}", "currency"),
        ("currency: dollars\nnode_types: {a: &x {on_demand: 1, looked_up: x}, b: *x}", "aliases"),
        ("- 1", "prices.yaml"),
        ("{", "not YAML"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_key(prices: Path, text: str, key: str) -> None:
    prices.write_text(text)
    with pytest.raises(PricesError) as refused:
        read_prices()
    assert "clusters/prices.yaml: " in str(refused.value) and key in str(refused.value)
