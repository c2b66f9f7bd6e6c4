"""Which sites of a guide hold one density together: auxiliary sites and the sites that are functions of them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ilvae.distributions import innermost

__all__ = ["DrawnSite", "joint_densities"]

_OWN_NAMES = ("_unconstrained", "_aux")  # what AutoNormal and AutoStructured append to the name of a site


class DrawnSite(NamedTuple):
    """A latent site that a guide drew."""

    fn: Any  #: its distribution
    value: Any  #: its value
    auxiliary: bool  #: whether the model does not have the site (``infer={"is_auxiliary": True}``)


def joint_densities(sites: Mapping[str, DrawnSite]) -> dict[str, set[str]]:
    r"""For each auxiliary site, the names of the sites that are functions of it.

    .. math:: \log q(z) = \log q(a) + \log |\det \partial a / \partial z|, \qquad z = t(a).

    A guide such as AutoNormal draws the auxiliary site a, and the site z is a Delta whose log density is the second
    term. Only the sum is a density of the model's variable, so the two sites belong together. A site that has an
    auxiliary site of its own, by the names that Pyro's guides give, is in one-to-one correspondence with it, and what
    else depends on this auxiliary site depends on the site. Other sites are read off the graph of autograd; where that
    does not tell, every site that could be a function of a counts as one.
    """
    auxiliary = {name for name, site in sites.items() if site.auxiliary}
    own = {name: _own(name, sites) & auxiliary for name in sites if name not in auxiliary}
    unnamed = auxiliary.difference(*own.values())
    together = {name: {site for site, names in own.items() if name in names} for name in auxiliary}
    ends: dict[Any, set[str]] = {}
    for name, site in sites.items():
        ends.setdefault(_node(site.value), set()).add(name)
    for name, site in sites.items():
        if name in auxiliary or own[name]:
            continue
        is_delta = isinstance(innermost(site.fn), dist.Delta)
        # The value of a Delta is what depends; other sites may depend by the arguments of their distribution as well.
        source = site.value if is_delta or not unnamed else site.fn.log_prob(site.value)
        for found in _reached(source, ends, name) & unnamed:
            together[found].add(name)
        for hidden in unnamed:
            untraced = _node(sites[hidden].value) is None or (is_delta and _node(source) is None)
            if untraced and (is_delta or not sites[hidden].value.is_floating_point()):
                together[hidden].add(name)
    return together


def make_traceable(value: Any) -> None:
    """Let autograd follow what depends on a fresh draw without parameters."""
    if (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and torch.is_grad_enabled()
        and not (value.requires_grad or value.is_inference())
    ):
        value.requires_grad_()


def _own(name: str, sites: Mapping[str, DrawnSite]) -> set[str]:
    """The site's auxiliary sites by name; one that is larger than the site is not determined by it."""
    names = {name + end for end in _OWN_NAMES} & set(sites)
    return {other for other in names if sites[other].value.numel() <= sites[name].value.numel()}


def _node(value: Any) -> Any:
    """The node of the graph of autograd that makes the value, or None."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return None
    return value.grad_fn or torch.autograd.graph.get_gradient_edge(value).node


def _reached(value: Any, ends: Mapping[Any, set[str]], own: str) -> set[str]:
    """The sites whose values the value is computed from, without the sites behind those."""
    reached: set[str] = set()
    waiting, seen = [_node(value)], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names = ends.get(node, set()) - {own}
        reached |= names
        if not names:
            waiting.extend(parent for parent, _ in node.next_functions)
    return reached
