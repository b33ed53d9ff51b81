"""Which tensors of a checkpoint make which site: from names, shapes and config.json, with no model instantiated.

Owns the way from the names on disk to the names of `sites.linear_sites(load_model(folder))`, in its order.
transformers renames, fuses and splits tensors when it loads a model; its own conversion mapping says how. The order
of a module's children is read from the text of transformers' modelling file, which is parsed, never run. Reads no
tensor.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from neurondrift.base.errors import ModelError
from neurondrift.models.architecture.experts import INTO, told_by_shapes
from neurondrift.models.architecture.saying import kinds_of, say_once

# Types whose linear layers are transformers' Conv1D, stored [in, out].
CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")

# Order of siblings where no source of transformers tells it (code that comes with a checkpoint).
USUAL_ORDER = (
    "self_attn attn attention self_attention q_proj query query_key_value qkv_proj c_attn k_proj key v_proj value "
    "o_proj out_proj dense c_proj mlp block_sparse_moe feed_forward gate experts gate_proj gate_up_proj up_proj "
    "dense_h_to_4h fc1 c_fc fc_in down_proj dense_4h_to_h fc2 fc_out shared_expert shared_experts shared_expert_gate"
).split()


class Part(NamedTuple):
    """Rows of a site: a slice of one tensor of a checkpoint.

    `expert` picks from the first axis of a 3-D tensor; `rows` (start, stop) is a range of a 2-D tensor's first axis,
    None for all of it; `transposed` says that the tensor is stored `[in, out]`.
    """

    tensor: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False


class SiteName(NamedTuple):
    """A site of a checkpoint: its name, decoder block, module type, and the tensors that make it, row after row."""

    name: str
    layer: int
    module_type: str
    parts: tuple[Part, ...]


def find_sites(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> list[SiteName]:
    """The sites of a checkpoint, named and ordered as those of the model that `load_model` would make of it.

    Parameters
    ----------
    shapes
        Tensor name on disk -> shape.
    config
        The content of config.json.

    Raises
    ------
    ModelError
        The decoder blocks are not found; a conversion that cannot be read site by site.
    """
    text = config.get("text_config") or config
    model_type = str(text.get("model_type") or config.get("model_type") or "")
    source = modelling_source(str(config.get("model_type") or model_type))
    if "text_config" in config and model_type != config.get("model_type"):
        nested = modelling_source(model_type)
        children = {**nested.children, **source.children}
        declares = source.declares_experts | nested.declares_experts
        source = Source(children, source.prefix, source.transposed | nested.transposed, declares)
    loaded = as_loaded(shapes, config)
    depth = _depth(text)
    prefix = _blocks_prefix(loaded, depth, config)
    renamed = prefix
    if source.prefix and "auto_map" not in config and not f"{prefix}.".startswith(f"{source.prefix}."):
        renamed = f"{source.prefix}.{prefix}"

    conv1d = model_type in CONV1D_TYPES
    parents_of_experts = {
        name.rpartition(".")[0]
        for name, tensor in loaded.items()
        if len(tensor.shape) == 3 and name.endswith("down_proj")
    }
    found: list[SiteName] = []
    left_out: list[str] = []
    for name, tensor in loaded.items():
        match = re.match(rf"{re.escape(prefix)}\.(\d+)\.", name)
        if match is None or (depth is not None and int(match[1]) >= depth):
            continue
        layer, full = int(match[1]), renamed + name[len(prefix) :]
        parent, _, leaf = full.rpartition(".")
        shape = tensor.shape
        if len(shape) == 2 and leaf == "weight":
            parts = tuple(part._replace(transposed=conv1d) for part in tensor.parts(None))
            found.append(SiteName(parent, layer, parent.rpartition(".")[2], parts))
        elif len(shape) == 3 and name.rpartition(".")[0] in parents_of_experts and not leaf.endswith("bias"):
            transposed = _is_transposed(name.rpartition(".")[0], loaded, source)
            if transposed is None:
                left_out.append(full)
                continue
            for expert in range(shape[0]):
                parts = tuple(part._replace(transposed=transposed) for part in tensor.parts(expert))
                found.append(SiteName(f"{full}.{expert}", layer, leaf, parts))
        elif sum(size > 1 for size in shape) > 1 and not leaf.endswith("bias"):
            left_out.append(full)
    if left_out:
        say_once(f"left out, as they are no matrix of a linear layer: {kinds_of(left_out)}")
    if not found:
        raise ModelError("The checkpoint has no linear weights in its decoder blocks", received=model_type)
    return _in_module_order(found, renamed, source)


def loaded_names(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> list[str]:
    """The names that the tensors of a checkpoint have once they are loaded, but for the base model's own prefix."""
    return list(as_loaded(shapes, config))


def _is_transposed(experts: str, loaded: Mapping[str, Loaded], source: Source) -> bool | None:
    """Whether experts are stored `[in, out]`, as `architecture.experts.is_transposed` says of the loaded module."""
    if source.transposed:
        return True
    into = next((loaded[name] for key in INTO if (name := f"{experts}.{key}") in loaded), None)
    told = None if into is None else told_by_shapes(into.shape, loaded[f"{experts}.down_proj"].shape)
    return False if told is None and source.declares_experts else told


class Loaded(NamedTuple):
    """A parameter of the loaded model: its shape, and the tensors on disk that make it.

    `sources` holds for each stacked piece the tensors of that piece: one tensor, or one for each expert.
    """

    shape: tuple[int, ...]
    sources: tuple[tuple[str, ...], ...]
    rows: tuple[int, int] | None = None

    def parts(self, expert: int | None) -> tuple[Part, ...]:
        """The tensors that make this parameter, or one expert of it."""
        if expert is None:
            return tuple(Part(piece[0], rows=self.rows) for piece in self.sources)
        if len(self.sources[0]) > 1 or len(self.sources) > 1:
            return tuple(Part(piece[expert]) for piece in self.sources)
        return (Part(self.sources[0][0], expert=expert),)


def as_loaded(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> dict[str, Loaded]:
    """The parameters of the loaded model, by transformers' own renamings and conversions."""
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    transforms = [] if "auto_map" in config else conversions(config)
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in transforms if not isinstance(entry, WeightConverter)]
    plain: dict[str, Loaded] = {}
    converted: dict[str, dict[str, list[str]]] = {}
    used: dict[str, Any] = {}
    for key in sorted(shapes, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters)
        if pattern is None:
            plain[name] = Loaded(shapes[key], ((key,),))
        else:
            converted.setdefault(name, {}).setdefault(pattern, []).append(key)
            used[name] = next(entry for entry in converters if pattern in entry.source_patterns)
    for name, collected in converted.items():
        plain |= _convert(name, used[name], collected, shapes)
    return plain


def conversions(config: Mapping[str, Any]) -> list[Any]:
    """transformers' conversions for the causal language model of this config, and for the models nested in it."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = str(config.get("model_type") or "")
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if isinstance(architecture, tuple | list):
        architecture = architecture[0]
    outer = [str(architecture or ""), kind]
    inner = [re.sub(r"For\w+$|LMHeadModel$", "Model", outer[0]) if outer[0] else ""]
    nested = config.get("text_config")
    if isinstance(nested, Mapping):
        inner.append(str(nested.get("model_type") or ""))
    found: list[Any] = []
    for names in (outer, *([name] for name in inner if name not in outer), ["legacy"]):
        mapping = next((m for m in (get_checkpoint_conversion_mapping(name) for name in names if name) if m), None)
        found += mapping or []
    return found


def _convert(
    name: str, converter: Any, collected: Mapping[str, list[str]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Loaded]:
    """The parameters that one conversion makes. Reading is by rows, so only conversions of rows are known:
    stacking experts, joining along the rows, and splitting rows."""
    operations = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
    pieces = tuple(tuple(collected[pattern]) for pattern in converter.source_patterns if pattern in collected)
    first = shapes[pieces[0][0]]
    if operations in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        counts = {len(piece) for piece in pieces}
        if len(pieces) != len(converter.source_patterns) or len(counts) != 1:
            raise ModelError(f"Experts of {name} are missing in the checkpoint", received=f"{sorted(counts)} tensors")
        rows = sum(shapes[piece[0]][0] for piece in pieces)
        return {name: Loaded((counts.pop(), rows, *first[1:]), pieces)}
    if operations == [("Concatenate", 0)]:
        flat = tuple((tensor,) for piece in pieces for tensor in piece)
        return {name: Loaded((sum(shapes[piece[0]][0] for piece in flat), *first[1:]), flat)}
    if operations == [("Chunk", 0)] and getattr(converter.operations[0], "num_shards_attribute", None) is None:
        targets = converter.target_patterns
        size = -(-first[0] // len(targets))
        ranges = [(start, min(start + size, first[0])) for start in range(0, first[0], size)]
        return {
            name.replace(targets[0], target): Loaded((stop - start, *first[1:]), pieces, (start, stop))
            for target, (start, stop) in zip(targets, ranges, strict=True)
        }
    if len(first) < 2:
        return {}
    raise ModelError(
        f"transformers converts the tensors of {name} in a way that cannot be read site by site",
        received=" then ".join(operation for operation, _ in operations),
        fix="load both models and call nd.compare_models(before, after)",
    )


def _depth(text: Mapping[str, Any]) -> int | None:
    """`num_hidden_layers` by whatever name the configuration's class knows it, its default where it is not written."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if "num_hidden_layers" in text:
        return int(text["num_hidden_layers"])
    try:
        return int(CONFIG_MAPPING[text["model_type"]].from_dict(dict(text)).num_hidden_layers)
    except (KeyError, AttributeError, TypeError, ValueError):
        return None


def _blocks_prefix(names: Iterable[str], depth: int | None, config: Mapping[str, Any]) -> str:
    """The name of the list of decoder blocks: the first numbered list of `num_hidden_layers` entries.

    A longer list is taken where none has the exact length: DeepSeek-V3 and GLM keep layers for multi-token
    prediction behind the last block, which transformers leaves out.
    """
    lists: dict[str, set[int]] = {}
    for name in names:
        match = re.match(r"(.*?[^.\d])\.(\d+)\.", name)
        if match is not None:
            lists.setdefault(match[1], set()).add(int(match[2]))
    for other in (
        r"vision|visual|audio|image|encoder\.",
        r"vision|visual|audio|image",
    ):  # a decoder may be an `encoder`
        text = {name: found for name, found in lists.items() if not re.search(other, name)}
        for exact in (True, False) if depth is not None else ():
            for name, found in text.items():
                if set(range(depth or 0)) <= found and (len(found) == depth or not exact):
                    return name
    if depth is not None and len(lists) == 1:  # the depth is told otherwise
        return next(iter(lists))
    raise ModelError(
        "The decoder blocks of this checkpoint were not found",
        received=f"{config.get('model_type')}, num_hidden_layers {depth}, lists {sorted(lists)}",
        allowed="a causal language model of transformers whose blocks are one list of num_hidden_layers modules",
    )


class Source(NamedTuple):
    """What the text of a modelling file says: class -> its attributes in order; the name of the base model in the
    class with a head; whether experts are stored `[experts, in, out]`; whether its experts declare how they are."""

    children: dict[str, tuple[str, ...]]
    prefix: str
    transposed: bool
    declares_experts: bool = False


@cache
def modelling_source(model_type: str) -> Source:
    """Parse the modelling file of a model type; empty where transformers has none."""
    import transformers
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    module = model_type_to_module_name(model_type) if model_type else ""
    folder = Path(transformers.__file__).parent / "models" / module.replace(".", "/")
    files = sorted(folder.glob("modeling_*.py")) if module else []
    stems = (f"modeling_{module.rpartition('.')[2]}", f"modeling_{model_type.replace('-', '_')}")
    chosen = [file for stem in stems for file in files if file.stem == stem]
    if not chosen:
        return Source({}, "", False)
    classes = [node for node in ast.parse(chosen[0].read_text("utf-8")).body if isinstance(node, ast.ClassDef)]
    children: dict[str, tuple[str, ...]] = {}
    prefix, transposed, declares = "", False, False
    for node in classes:
        own = _attributes(node)
        inherited = [name for base in node.bases for name in children.get(ast.unparse(base), ())]
        children[node.name] = tuple(dict.fromkeys([*inherited, *own]))
        if not prefix and "PreTrainedModel" in node.name and not re.search("Vision|Audio", node.name):
            prefix = _constant(node, "base_model_prefix")
        decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
        transposed |= any("is_transposed=True" in decorator for decorator in decorators)
        declares |= any("use_experts_implementation" in decorator for decorator in decorators)
    return Source(children, prefix, transposed, declares)


def _attributes(node: ast.ClassDef) -> list[str]:
    """The names that `__init__` sets on self, in order."""
    body = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
    targets = [
        target
        for statement in (ast.walk(body) if body is not None else ())
        if isinstance(statement, ast.Assign | ast.AnnAssign)
        for target in (statement.targets if isinstance(statement, ast.Assign) else [statement.target])
        if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"
    ]
    return [target.attr for target in sorted(targets, key=lambda target: (target.lineno, target.col_offset))]


def _constant(node: ast.ClassDef, name: str) -> str:
    for statement in node.body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            return str(ast.literal_eval(statement.value))
    return ""


def _in_module_order(sites: Sequence[SiteName], prefix: str, source: Source) -> list[SiteName]:
    """Sites in the order of `named_modules()`: blocks by number, siblings as their class makes them."""
    siblings: dict[tuple[str, ...], set[str]] = {}
    paths = {site.name: tuple(site.name[len(prefix) + 1 :].split(".")) for site in sites}
    for path in paths.values():
        for depth in range(1, len(path)):
            siblings.setdefault(path[:depth], set()).add(path[depth])
    ranks = {parent: _ranks(frozenset(names), source) for parent, names in siblings.items()}

    def key(site: SiteName) -> list[tuple[int, str]]:
        path = paths[site.name]
        return [(int(path[0]), ""), *((ranks[path[:d]][path[d]], path[d]) for d in range(1, len(path)))]

    return sorted(sites, key=key)


def _ranks(names: frozenset[str], source: Source) -> dict[str, int]:
    """The rank of each sibling among `names`: numbers by value, else as in the class that sets them all."""
    if all(name.isdigit() for name in names):
        return {name: int(name) for name in names}
    known = [attributes for attributes in source.children.values() if names <= set(attributes)]
    orders = [sorted(names, key=attributes.index) for attributes in known]
    if known:  # where classes differ, the one that has the least beside
        chosen = orders[0] if all(order == orders[0] for order in orders) else orders[known.index(min(known, key=len))]
        return {name: rank for rank, name in enumerate(chosen)}
    usual = {name: rank for rank, name in enumerate(USUAL_ORDER)}
    return {name: usual.get(name, len(usual)) for name in names}
