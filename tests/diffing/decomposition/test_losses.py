"""Every quantity of the objective equals what the authors' one-file reference gave (tests/data/vpd/README.md)."""

from typing import Any

import pytest
import torch
from decompositions import (
    COUNTED,
    RecordedTask,
    recorded,
    recorded_decomposition,
    recorded_importances,
)
from torch import Tensor

from diffing.decomposition.adversary import Adversary, attack, gradients_of
from diffing.decomposition.losses.adversarial import adversarial_reconstruction
from diffing.decomposition.losses.faithfulness import faithfulness, relative_remainder
from diffing.decomposition.losses.frequency import frequency
from diffing.decomposition.losses.minimality import minimality, power, smooth_l0, sums
from diffing.decomposition.losses.reconstruction import masks_of, mean_kl, reconstruction
from diffing.decomposition.losses.stochastic import random_routes, routes, stochastic_reconstruction
from diffing.decomposition.sigmoids import lower_leaky, upper_leaky
from diffing.decomposition.sites import Delta, Masks, Site

TASK = RecordedTask()


def same(mine: Tensor, reference: Tensor) -> None:
    bound = 1e-5 * float(reference.abs().max()) + 1e-7
    assert mine.shape == reference.shape and float((mine - reference).abs().max()) <= bound


def gradients(loss: Tensor, **leaves: Tensor) -> dict[str, Tensor]:
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), retain_graph=True), strict=True))


def leaves_of(decomposition: Any, pre: dict[str, Tensor]) -> dict[str, Tensor]:
    sites = decomposition.sites
    return {f"{kind}_{n}": getattr(sites[n], kind) for kind in "UV" for n in "ab"} | {f"pre_{n}": pre[n] for n in "ab"}


def sources_of(values: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: values[f"{key}_{name}"].clone().requires_grad_() for name in "ab"}


@pytest.mark.parametrize("alpha", [0.01, 0.2])
def test_the_sigmoids_and_their_backward_rules_equal_the_recorded(alpha: float) -> None:
    values = recorded("01")
    for name, sigmoid in (("lower", lower_leaky), ("upper", upper_leaky)):
        x = values["x"].clone().requires_grad_()
        y = sigmoid(x, alpha)
        (gradient,) = torch.autograd.grad(y, x, values["grad_out"])
        same(y.detach(), values[f"{name}_y_a{alpha}"])
        same(gradient, values[f"{name}_grad_x_a{alpha}"])


def test_masks_and_routes_equal_the_recorded() -> None:
    values = recorded("02")
    for name in "ab":
        u = torch.cat([values[f"u_{name}"], values[f"delta_mask_{name}"][..., None]], dim=-1)
        masks = masks_of(values[f"ci_{name}"], u)
        same(masks.components, values[f"mask_{name}"])
        assert torch.equal(masks.remainder, values[f"delta_mask_{name}"])
    assert torch.equal(routes(values["route4_k"], values["route4_noise"]), values["routing4"])
    routed = routes(values["route_k"], values["route_noise"])
    assert all(torch.equal(routed[i], values[f"routing_{name}"]) for i, name in enumerate("ab"))


def test_a_masked_site_and_its_gradients_equal_the_recorded() -> None:
    values = recorded("03")
    site = Site(Delta(values["W"]), 6, torch.Generator())
    site.set_pieces(values["V"], values["U"])
    x, m, d = (values[name].clone().requires_grad_() for name in ("x", "mask", "delta_mask"))

    def out_of(masks: Masks, bias: Tensor = values["bias"]) -> Tensor:
        return site.masked(x, x @ values["W"].T + bias, masks)

    same(site.remainder().detach(), values["weight_delta"])
    same(out_of(Masks(m, d)).detach(), values["out_masked"])
    same(out_of(Masks(m, d), torch.zeros(7)).detach(), values["out_masked_nobias"])
    same(out_of(Masks(m, d, values["routing"])).detach(), values["out_masked_routed"])
    for mask in (0.0, 1.0):
        for remainder in (0.0, 1.0):
            name = "out_target" if mask and remainder else f"out_mask{mask:.0f}_delta{remainder:.0f}"
            same(out_of(Masks(torch.full((6,), mask), torch.tensor(remainder))).detach(), values[name])
    for ending, routed in (("", None), ("_routed", values["routing"])):
        loss = (out_of(Masks(m, d, routed)) * values["cotangent"]).sum()
        found = gradients(loss, U=site.U, V=site.V, mask=m, delta_mask=d, x=x)
        for name, gradient in found.items():
            same(gradient, values[f"grad_{name}{ending}"])


def test_faithfulness_pools_the_entries_of_all_sites_as_recorded() -> None:
    values, decomposition = recorded("04"), recorded_decomposition()
    loss = faithfulness([site.remainder() for site in decomposition.sites.values()])
    same(loss.detach(), values["loss"])
    for name, site in decomposition.sites.items():
        same(faithfulness([site.remainder()]).detach(), values[f"loss_only_{name}"])
        for kind, gradient in gradients(loss, U=site.U, V=site.V).items():
            same(gradient, values[f"grad_{kind}_{name}"])


def test_the_relative_remainder_does_not_change_with_the_size_of_a_change() -> None:
    remainder, delta = torch.full((2, 3), 1.0), torch.full((2, 3), 2.0)
    assert float(relative_remainder([remainder, 100 * remainder], [delta, 100 * delta])) == 0.25
    assert float(relative_remainder([torch.zeros(2, 3)], [torch.zeros(2, 3)])) == 0


def test_kl_and_its_gradient_equal_the_recorded() -> None:
    values = recorded("05")
    pred = values["pred"].clone().requires_grad_()
    loss = mean_kl(values["target"].flatten(0, 1), pred.flatten(0, 1))
    same(loss.detach(), values["loss"])
    same(gradients(loss, pred=pred)["pred"], values["grad_pred"])


def target() -> Tensor:
    return recorded("00")["target_logits"].flatten(0, 1)


@pytest.mark.parametrize("routed", [True, False])
def test_stochastic_reconstruction_equals_the_recorded(routed: bool) -> None:
    values, decomposition = recorded("06"), recorded_decomposition()
    importances, pre = recorded_importances()
    masks = {}
    for name in "ab":
        u = torch.cat([values[f"u_{name}"], values[f"delta_mask_{name}"][..., None]], dim=-1)
        masks[name] = masks_of(importances[name].lower, u, values[f"routing_{name}"] if routed else None)
        same(masks[name].components.detach(), values[f"mask_{name}"])
    word, ids = "routed" if routed else "unrouted", recorded("00")["input_ids"]
    with decomposition.masked(masks):
        same(decomposition.model(ids).detach(), values[f"{word}_pred_logits"])
    loss = reconstruction(decomposition, TASK, ids, target(), masks)
    same(loss.detach(), values[f"{word}_loss"])
    lower = {f"ci_{name}": importances[name].lower for name in "ab"}
    for name, gradient in gradients(loss, **leaves_of(decomposition, pre), **lower).items():
        same(gradient, values[f"{word}_grad_{name}"])


def test_reconstructions_with_constant_masks_equal_the_recorded() -> None:
    values, decomposition = recorded("06"), recorded_decomposition()
    ids, of_ones = recorded("00")["input_ids"], decomposition.constant(1, 1)
    importances, _ = recorded_importances()
    assert abs(float(reconstruction(decomposition, TASK, ids, target(), of_ones).detach())) < 1e-6
    same(
        reconstruction(decomposition, TASK, ids, target(), decomposition.constant(1, 0)).detach(),
        values["loss_mask1_delta0"],
    )
    of_importance = {name: Masks(importances[name].lower, torch.tensor(0.0)) for name in "ab"}
    same(reconstruction(decomposition, TASK, ids, target(), of_importance).detach(), values["loss_maskci_delta0"])


def test_the_adversarial_reconstruction_and_the_gradient_of_its_sources_equal_the_recorded() -> None:
    values, decomposition = recorded("07"), recorded_decomposition()
    importances, pre = recorded_importances()
    sources = sources_of(values, "src")
    loss = adversarial_reconstruction(decomposition, TASK, recorded("00")["input_ids"], target(), importances, sources)
    same(loss.detach(), values["recon_loss"])
    others = {f"ci_{n}": importances[n].lower for n in "ab"} | {f"src_{n}": sources[n] for n in "ab"}
    for name, gradient in gradients(loss, **leaves_of(decomposition, pre), **others).items():
        same(gradient, values[f"recon_grad_{name}"])


@pytest.mark.parametrize(("case", "t", "lr"), [("step1", 0, "lr"), ("warm", 3, "lr"), ("clamp", 3, "clamp_lr")])
def test_a_step_of_the_adversary_equals_the_recorded(case: str, t: int, lr: str) -> None:
    values = recorded("07")
    adversary = Adversary({name: values[f"src_{name}"] for name in "ab"})
    if t:
        state = {f"{kind}.{n}": values[f"{kind}0_{n}"] for kind in "mv" for n in "ab"}
        adversary.restore(adversary.state() | state | {"t": torch.tensor(t)})
    adversary.ascend({name: values[f"fixed_grad_{name}"] for name in "ab"}, float(values[lr]))
    for name in "ab":
        same(adversary.sources[name], values[f"{case}_src_{name}"])
        for kind in ("m", "v") if case != "clamp" else ():
            same(getattr(adversary, kind)[name], values[f"{case}_{kind}_{name}"])


def test_three_ascents_through_the_model_equal_the_recorded() -> None:
    values, decomposition = recorded("07"), recorded_decomposition()
    importances, _ = recorded_importances()
    adversary, ids = Adversary({name: values[f"src_{name}"] for name in "ab"}), recorded("00")["input_ids"]

    def loss_with(sources: dict[str, Tensor]) -> Tensor:
        return adversarial_reconstruction(decomposition, TASK, ids, target(), importances, sources)

    for step in range(3):
        if step == 2:
            for name in "ab":
                same(adversary.sources[name], values[f"warmup2_src_{name}"])
                same(adversary.v[name], values[f"warmup2_v_{name}"])
        sources = adversary.on(torch.Size((3, 4)))
        adversary.ascend(gradients_of(loss_with(sources), sources), float(values["lr"]))
    for name in "ab":
        same(adversary.sources[name], values[f"after3_src_{name}"])
    same(loss_with(adversary.sources).detach(), values["after3_loss"])


def test_the_fresh_adversary_equals_the_recorded() -> None:
    values, decomposition = recorded("08"), recorded_decomposition()
    importances, _ = recorded_importances()
    ids, start = recorded("00")["input_ids"], {name: values[f"src0_{name}"] for name in "ab"}

    def loss_with(sources: Any) -> Tensor:
        return adversarial_reconstruction(decomposition, TASK, ids, target(), importances, sources)

    for steps in (1, 2, 20):
        moved, losses = attack(loss_with, start, steps=steps, step_size=float(values["step_size"]))
        for name in "ab":
            same(moved[name], values[f"src{steps}_{name}"])
        same(
            torch.tensor([losses[0], losses[-1]]), torch.stack([values["loss_after_0"], values[f"loss_after_{steps}"]])
        )


@pytest.mark.parametrize("p", [2.0, 1.0, 0.4])
@pytest.mark.parametrize("eps", [1e-12, 0.01])
@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("ranks", [1, 4])
def test_minimality_with_frequency_equals_the_recorded(p: float, eps: float, beta: float, ranks: int) -> None:
    values, tag = recorded("09"), f"p{p}_eps{eps:g}_beta{beta}_ws{ranks}"
    _, pre = recorded_importances()
    g = {name: upper_leaky(z) for name, z in pre.items()}

    def loss_of(names: str) -> Tensor:
        totals = list(sums({name: power(g[name], p, eps) for name in names}, COUNTED).values())
        return minimality(totals, 12) + beta * frequency(totals, 12, ranks * 12)

    same(loss_of("ab").detach(), values[f"loss_{tag}"])
    if ranks == 1:
        same(
            torch.stack([loss_of(n).detach() for n in "ab"]),
            torch.stack([values[f"loss_only_{n}_{tag}"] for n in "ab"]),
        )
    for name in "ab" if f"grad_ci_a_{tag}" in values else "":
        found = gradients(loss_of("ab"), ci=g[name], pre=pre[name])
        torch.testing.assert_close(found["ci"], values[f"grad_ci_{name}_{tag}"], rtol=1e-5, atol=1e-7)
        same(found["pre"], values[f"grad_pre_{name}_{tag}"])


def test_the_whole_objective_equals_the_recorded() -> None:
    values, decomposition = recorded("10"), recorded_decomposition()
    importances, pre = recorded_importances()
    draws, sources, ids = recorded("06"), sources_of(recorded("07"), "src"), recorded("00")["input_ids"]
    masks = {
        name: masks_of(
            importances[name].lower,
            torch.cat([draws[f"u_{name}"], draws[f"delta_mask_{name}"][..., None]], dim=-1),
            draws[f"routing_{name}"],
        )
        for name in "ab"
    }
    penalties = {n: power(importances[n].upper, float(values["p"]), float(values["imp_eps"])) for n in "ab"}
    totals = list(sums(penalties, COUNTED).values())
    losses = {
        "faith": faithfulness([site.remainder() for site in decomposition.sites.values()]),
        "imp": minimality(totals, 12) + values["imp_beta"] * frequency(totals, 12, 12),
        "stoch": reconstruction(decomposition, TASK, ids, target(), masks),
        "ppgd": adversarial_reconstruction(decomposition, TASK, ids, target(), importances, sources),
    }
    for name, loss in losses.items():
        same(loss.detach(), values[f"loss_{name}"])
    total = torch.stack([values[f"coeff_{name}"] * loss for name, loss in losses.items()]).sum()
    same(total.detach(), values["total"])
    for name, gradient in gradients(total, **leaves_of(decomposition, pre)).items():
        same(gradient, values[f"grad_{name}"])


def test_importance_terms_do_not_change_when_the_batch_is_split() -> None:
    _, pre = recorded_importances()
    penalties = {name: smooth_l0(upper_leaky(z), 0.3) for name, z in pre.items()}
    whole = sums(penalties, COUNTED)
    parts = [sums({n: p[rows] for n, p in penalties.items()}, COUNTED[rows]) for rows in (slice(0, 1), slice(1, 3))]
    joined = [parts[0][name] + parts[1][name] for name in "ab"]
    torch.testing.assert_close(minimality(joined, 12), minimality(list(whole.values()), 12))
    torch.testing.assert_close(frequency(joined, 12, 100), frequency(list(whole.values()), 12, 100))


def test_smooth_l0_counts_at_a_small_gamma_and_has_no_slope_at_zero() -> None:
    g = torch.tensor([0.0, 0.5, 1.0], requires_grad=True)
    assert smooth_l0(g, 1e-3).tolist() == pytest.approx([0, 1, 1], abs=1e-5)
    assert gradients(smooth_l0(g, 0.1).sum(), g=g)["g"][0] == 0


def test_routes_take_one_to_all_sites_equally_often() -> None:
    routed = random_routes(3, torch.Size((6000,)), torch.Generator().manual_seed(1), torch.device("cpu"))
    counts = routed.sum(dim=0).bincount(minlength=4).tolist()
    assert counts[0] == 0 and all(abs(count - 2000) < 150 for count in counts[1:])
    assert all(abs(int(of_site) - 4000) < 150 for of_site in routed.sum(dim=1))


def test_an_unrouted_site_has_no_gradient() -> None:
    decomposition, ids = recorded_decomposition(), recorded("00")["input_ids"]
    masks = {n: m._replace(routed=torch.zeros(3, 4, dtype=torch.bool)) for n, m in decomposition.constant(0, 0).items()}
    loss = reconstruction(decomposition, TASK, ids, target(), masks)
    assert all(
        not gradient.any()
        for gradient in gradients(
            loss, **leaves_of(decomposition, {"a": decomposition.sites["a"].U, "b": decomposition.sites["b"].V})
        ).values()
    )


def test_a_stochastic_draw_stays_between_importance_and_one() -> None:
    decomposition, (importances, _) = recorded_decomposition(), recorded_importances()
    masks_seen = {}
    masked = decomposition.masked
    decomposition.masked = lambda masks: masks_seen.update(masks) or masked(masks)  # type: ignore[method-assign]
    stochastic_reconstruction(
        decomposition, TASK, recorded("00")["input_ids"], target(), importances, torch.Generator().manual_seed(0)
    )
    for name, importance in importances.items():
        m = masks_seen[name].components
        assert bool(((m >= importance.lower) & (m <= 1)).all()) and not torch.equal(m, importance.lower)
