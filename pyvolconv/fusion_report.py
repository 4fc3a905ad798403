"""What became of every 3-D convolution and norm of a model, and why no more: `fusion_report(model)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn

from .batch_norm import uses_batch_statistics
from .fused_graph import called_by
from .fusion import Findings, Site, find
from .links import (
    CONVOLUTION_CHAIN,
    flatten,
    has_global_hooks,
    is_plain_sequential,
    link_of,
    obstacle,
    obstacle_of_class,
    original_class,
)
from .nn import BatchNorm3d, Conv3d, ConvTranspose3d, InstanceNorm3d


@dataclass(frozen=True)
class Row:
    """One convolution or norm.

    Attributes:
        module: its path in the model.
        became: what computes it now.
        why_not: why no more of its surroundings is fused with it, and the chain that would run otherwise; empty when it
            stands in a chain that runs.
    """

    module: str
    became: str
    why_not: str


@dataclass(frozen=True)
class FusionReport:
    """A row for every 3-D convolution, InstanceNorm3d and BatchNorm3d in training mode; `str()` is a table.

    Rows are in the order of `model.modules()`.

    Attributes:
        rows: what became of each.
    """

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        if not self.rows:
            return "The model has no 3-D convolution."
        table = [("module", "became", "why not more"), *((r.module, r.became, r.why_not) for r in self.rows)]
        widths = [max(len(line[column]) for line in table) for column in range(3)]
        table.insert(1, ("-" * widths[0], "-" * widths[1], "-" * widths[2]))
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        )


def fusion_report(model: nn.Module) -> FusionReport:
    """What `accelerate` made of each 3-D convolution and norm, as the model stands now.

    Args:
        model: any module; it is only looked at. One that was not accelerated says so in every row.

    Returns:
        The report; print it for a table.

    Raises:
        TypeError: `model` is no module.

    Example:
        >>> import torch, pyvolconv
        >>> model = torch.nn.Sequential(torch.nn.Conv3d(1, 4, 3), torch.nn.ReLU(), torch.nn.MaxPool3d(2))
        >>> print(pyvolconv.fusion_report(pyvolconv.accelerate(model)))
        module  became                                 why not more
        ------  -------------------------------------  ------------
        0       Conv3d + ReLU + MaxPool3d in one pass
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fusion_report() takes a torch.nn.Module, got {type(model).__name__}")
    findings = find(model)
    return FusionReport(
        tuple(
            _row(path, module, model, findings)
            for path, module in model.named_modules()
            if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d, nn.InstanceNorm3d))
            or (isinstance(module, nn.BatchNorm3d) and uses_batch_statistics(module))
        )
    )


def _row(path: str, module: nn.Module, model: nn.Module, findings: Findings) -> Row:
    name = original_class(module).__name__
    if not isinstance(module, (Conv3d, ConvTranspose3d, InstanceNorm3d, BatchNorm3d)):
        return Row(path, f"{name} of torch", "not accelerated")
    alone = f"{name} alone"
    if isinstance(module, nn.ConvTranspose3d):
        return Row(path, alone, "transposed convolutions are not fused")
    site = findings.sites.get(path)
    if site is None:
        return Row(path, alone, _why_alone(path, module, model, findings))
    if not hasattr(type(model.get_submodule(site.owner)), "_pyvolconv_original"):
        return Row(path, alone, "accelerated without fusing")
    now = "hooks around every module" if has_global_hooks() else ""
    now = now or next((why for _, link in site.chain if (why := _obstacle(link, site))), "")
    return Row(path, alone, f"{now}; otherwise {site}") if now else Row(path, str(site), "")


def _obstacle(link: nn.Module, site: Site) -> str:
    """Why a link does not run in the chain now; a BatchNorm3d at its start may train, and keep no statistics."""
    is_first = link is site.chain[0][1]
    return obstacle_of_class(link) if is_first and isinstance(link, nn.BatchNorm3d) else obstacle(link)


def _why_alone(path: str, module: nn.Module, model: nn.Module, findings: Findings) -> str:
    if path in findings.shared:
        return "stands in several places, or shares a parameter"
    why = obstacle_of_class(module) if isinstance(module, nn.BatchNorm3d) else obstacle(module, in_any_mode=True)
    if why:
        return why
    owner, name = _owner(path, model)
    parent = model.get_submodule(owner)
    if is_plain_sequential(parent):
        items = list(flatten(cast("nn.Sequential", parent)))
        place = [inner for inner, _ in items].index(name)
        if place + 1 < len(items):
            inner, following = items[place + 1]
            return _why_not_with(module, f"{owner}.{inner}" if owner else inner, following, findings)
        if not owner:
            return "nothing follows"
        return _why_not_in_code(owner, model, findings)
    return _why_not_in_code(path, model, findings)


def _owner(path: str, model: nn.Module) -> tuple[str, str]:
    """(path of the outermost plain Sequential, or else the module, that a convolution stands in; its name there)."""
    parts = path.split(".")
    cut = len(parts) - 1
    while cut and is_plain_sequential(model.get_submodule(".".join(parts[:cut]))):
        if not is_plain_sequential(model.get_submodule(".".join(parts[: cut - 1]))):
            break
        cut -= 1
    return ".".join(parts[:cut]), ".".join(parts[cut:])


def _why_not_with(module: nn.Module, path: str, following: nn.Module, findings: Findings) -> str:
    name = original_class(following).__name__
    if isinstance(module, (nn.InstanceNorm3d, nn.BatchNorm3d)):
        why = obstacle(following, in_any_mode=True) if link_of(following) else ""
        return why or f"{name} follows, which does not run in its pass"
    link = link_of(following)
    if link == "instance normalization":
        return f"{name} follows, which reads all of its input before it writes"
    if link not in CONVOLUTION_CHAIN[1:]:
        return f"{name} follows, which is no link of a chain"
    if path in findings.shared:
        return f"{name} stands in several places, or shares a parameter"
    return obstacle(following, in_any_mode=True) or f"{name} follows without a pool: no pass would be saved"


def _why_not_in_code(path: str, model: nn.Module, findings: Findings) -> str:
    """Why forward code that calls the module at `path` was not fused."""
    owner, _, name = path.rpartition(".")
    while owner and owner not in findings.graphs and owner not in findings.unproven:
        owner, _, part = owner.rpartition(".")
        name = f"{part}.{name}"
    if owner in findings.unproven:
        return findings.unproven[owner]
    root = model.get_submodule(owner)
    code = f"{original_class(root).__name__}.forward"
    graph = findings.graphs.get(owner)
    nodes = [node for node in graph.nodes if node.op == "call_module" and node.target == name] if graph else []
    if len(nodes) != 1:
        return f"{code} calls it {len(nodes)} times"
    users = list(nodes[0].users)
    if len(users) > 1:
        return f"{code} uses its result {len(users)} times"
    called = called_by(users[0], root)
    if not called:
        return f"{code} hands its result to what is no link of a chain"
    path = f"{owner}.{called[0][0]}" if owner else called[0][0]
    return _why_not_with(root.get_submodule(name), path, called[0][1], findings)
