"""Which pieces act on which others in one prompt, and on the next token: a graph, drawn with Plotly.

A node is a piece at a position where it is important. An edge from a to b is the gradient of what b reads (v_b . x
times ||u_b||) with respect to the mask of a, at masks of 1: to first order, what b would lose without a. An edge to the
output is the same for the log odds of the token that is predicted last.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from diffing.decomposition.loop import ON
from diffing.decomposition.model import Decomposition
from diffing.decomposition.sites import Masks

NODES, EDGES = 30, 80
"""Most that are drawn, the strongest ones."""


class Node(NamedTuple):
    """A piece at a position."""

    site: str
    piece: int
    position: int
    importance: float


class Edge(NamedTuple):
    """From one node to a later one; target -1 is the output."""

    source: int
    target: int
    weight: float


class Graph(NamedTuple):
    """Hold the nodes and edges of one prompt."""

    tokens: list[str]
    predicted: str
    """The token that the tuned model predicts after the last."""
    nodes: list[Node]
    edges: list[Edge]


def prompt_graph(decomposition: Decomposition, ids: Int[Tensor, "1 seq"], tokenizer: Any) -> Graph:
    """Return the graph of a prompt."""
    masks = {
        name: Masks(
            torch.ones(*ids.shape, site.n_components, device=ids.device, requires_grad=True), site.U.new_tensor(1.0)
        )
        for name, site in decomposition.sites.items()
    }
    with torch.enable_grad(), decomposition.masked(masks), decomposition.reading(with_graph=True) as inputs:
        logits = decomposition.model(input_ids=ids, use_cache=False).logits[0, -1].float()
    nodes = _nodes(decomposition, inputs)
    best = int(logits.argmax())
    others = torch.cat([logits[:best], logits[best + 1 :]])
    targets = [_read(decomposition, inputs, node) for node in nodes] + [logits[best] - others.logsumexp(dim=0)]
    leaves = [of.components for of in masks.values()]
    edges = []
    for number, target in enumerate(targets):
        found = torch.autograd.grad(target, leaves, retain_graph=True, allow_unused=True)
        of_site = dict(zip(masks, found, strict=True))
        for source, node in enumerate(nodes):
            gradient = of_site[node.site]
            if gradient is None or source == number:
                continue
            weight = float(gradient[0, node.position, node.piece])
            if weight:
                edges.append(Edge(source, number if number < len(nodes) else -1, weight))
    edges = sorted(edges, key=lambda edge: -abs(edge.weight))[:EDGES]
    return Graph([tokenizer.decode([i]) for i in ids[0].tolist()], tokenizer.decode([best]), nodes, edges)


def _nodes(decomposition: Decomposition, inputs: dict[str, Tensor]) -> list[Node]:
    found = []
    with torch.no_grad():
        importances = decomposition.importances(inputs)
        for name, site in decomposition.sites.items():
            g = importances[name].lower[0]
            size = (g * site.activations(inputs[name])[0]).abs() * site.pieces()[1].norm(dim=1)
            for position, piece in (g > ON).nonzero().tolist():
                amount = float(size[position, piece])
                found.append((amount, Node(name, piece, position, float(g[position, piece]))))
    return [node for _, node in sorted(found, key=lambda pair: -pair[0])[:NODES]]


def _read(decomposition: Decomposition, inputs: dict[str, Tensor], node: Node) -> Tensor:
    site = decomposition.sites[node.site]
    activation = site.activations(inputs[node.site])[0, node.position, node.piece]
    return activation * site.pieces()[1][node.piece].norm()


def draw(graph: Graph, sites: list[str]) -> Any:
    """Return the Plotly figure: tokens from left to right, sites from below in the model's order, the output on top."""
    import plotly.graph_objects as go

    rows = {name: i for i, name in enumerate(sites)}
    xs, ys = [node.position + 0.08 * (node.piece % 5 - 2) for node in graph.nodes], [rows[n.site] for n in graph.nodes]
    top = (len(graph.tokens) - 1, len(sites))
    largest = max((abs(edge.weight) for edge in graph.edges), default=1.0)
    lines = [
        go.Scatter(
            x=[xs[edge.source], top[0] if edge.target < 0 else xs[edge.target]],
            y=[ys[edge.source], top[1] if edge.target < 0 else ys[edge.target]],
            mode="lines", hoverinfo="skip", showlegend=False,
            line={"width": 0.5 + 5 * abs(edge.weight) / largest, "color": "#d55e00" if edge.weight > 0 else "#2f86c9"},
            opacity=0.2 + 0.6 * abs(edge.weight) / largest,
        )
        for edge in graph.edges
    ]  # fmt: skip
    words = [f"{n.site} {n.piece}<br>importance {n.importance:.2f}" for n in graph.nodes]
    points = go.Scatter(
        x=[*xs, top[0]], y=[*ys, top[1]], mode="markers", hovertext=[*words, f"next token {graph.predicted!r}"],
        hoverinfo="text", showlegend=False, marker={"size": 9, "color": "#333333"},
    )  # fmt: skip
    ticks = [token.replace("\n", "↵").replace("<", "&lt;") for token in graph.tokens]
    return go.Figure(
        [*lines, points],
        go.Layout(
            xaxis={"tickvals": list(range(len(ticks))), "ticktext": ticks},
            yaxis={"tickvals": list(range(len(sites) + 1)), "ticktext": [*sites, f"next token {graph.predicted!r}"],
                   "automargin": True},
            height=200 + 24 * len(sites), margin={"t": 30}, plot_bgcolor="white",
        ),
    )  # fmt: skip


def write_graph(graph: Graph, sites: list[str], path: Path) -> None:
    """Write the figure as one page that needs no network."""
    from crosscoders.common import files

    html = draw(graph, sites).to_html(include_plotlyjs=True, full_html=True)
    files.write_bytes(path, html.encode())
