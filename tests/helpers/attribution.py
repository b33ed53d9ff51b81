"""What a change does, by plain autograd on dense float64 weights: written without the code under test."""

import copy

import torch

from helpers.families import build, examples
from neurondrift.models.adapters import effective_weight
from neurondrift.models.loading import byte_tokenizer
from neurondrift.models.sites import linear_sites, mlp_units

PROMPTS = ["Hi", "How are you?", "x y"]
TOKENIZER = byte_tokenizer()


def built(family, seed=0):
    """The family's tiny model, its experts in a form that takes float64."""
    model = build(family, seed)
    model.config._experts_implementation = "eager"
    return model


def with_bytes(family, seed=0):
    """The family's tiny model with a row for each byte token."""
    model = built(family, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.resize_token_embeddings(264, mean_resizing=False)
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            torch.nn.init.normal_(module.weight, std=0.2)
    return model


def moved(model, scale=0.005, seed=3):
    """A copy of which every parameter has moved a little."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in other.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return other


def merged(adapted, base):
    """The base model with what an adapter makes of its sites written into a copy."""
    other = copy.deepcopy(base)
    for name, site in linear_sites(adapted).items():
        linear_sites(other)[name].weight.copy_(effective_weight(site))
    return other


def mean_loss(model, rows=None):
    """The mean over examples of the mean cross-entropy of the response, one example at a time."""
    losses = []
    for row in rows or examples():
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        log = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        kept = labels[1:] != -100
        losses.append(-log[kept].gather(1, labels[1:][kept][:, None]).mean())
    return torch.stack(losses).mean()


def margins(model, openings, prompts=PROMPTS, tokenizer=TOKENIZER):
    """The margin of each prompt: one forward for each opening."""
    found = []
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        sides = []
        for texts in (openings.refusal, openings.compliance):
            texts = [text for text in texts if not any(o != text and text.startswith(o) for o in texts)]
            logs = []
            for text in texts:
                own = tokenizer(text, add_special_tokens=False)["input_ids"]
                log = model(input_ids=torch.tensor([ids + own]), use_cache=False).logits[0].log_softmax(-1)
                logs.append(sum(log[len(ids) - 1 + at, token] for at, token in enumerate(own)))
            sides.append(torch.stack(logs).logsumexp(0))
        found.append(sides[0] - sides[1])
    return torch.stack(found)


def weights_of(model):
    return {name: parameter.detach().double() for name, parameter in model.named_parameters()}


def gradients_at(model, weights, number):
    """Parameter -> gradient of a number of the model with these weights, float64."""
    double = copy.deepcopy(model).double()
    for name, parameter in double.named_parameters():
        parameter.data = weights[name].clone()
        parameter.requires_grad_(True)
    value = number(double)
    names, parameters = zip(*double.named_parameters(), strict=True)
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, found, strict=True)
    }, double


def per_site(model, tensors):
    """Site -> its matrix `[out, in]`, from tensors by parameter name; and the tensors of no site."""
    sites = linear_sites(model)
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    of_sites = {name: site.oriented(tensors[by_id[id(site.tensor)]]) for name, site in sites.items()}
    own = {by_id[id(site.tensor)] for site in sites.values()}
    return of_sites, {name: tensor for name, tensor in tensors.items() if name not in own}


def path_oracle(before, after, number, points):
    """Rows, units and the rest of the attributed change of a number, float64."""
    start, end = weights_of(before), weights_of(after)
    change = {name: end[name] - start[name] for name in start}
    total = {name: torch.zeros_like(value) for name, value in change.items()}
    for j in range(points):
        weights = {name: start[name] + (j + 0.5) / points * change[name] for name in start}
        for name, gradient in gradients_at(before, weights, number)[0].items():
            total[name] += gradient * change[name] / points
    of_sites, rest = per_site(before, total)
    rows = {name: matrix.sum(dim=1) for name, matrix in of_sites.items()}
    units = {}
    for name, unit in mlp_units(linear_sites(before)).items():
        units[name] = of_sites[unit.down].sum(dim=0)
        for site, offset in unit.ups:
            units[name] = units[name] + rows[site][unit.rows(offset)]
    return rows, units, {name: float(tensor.sum()) for name, tensor in rest.items()}
