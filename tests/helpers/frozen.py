"""Training under a freeze, and the check that what is frozen stands still to the bit."""

import torch

from helpers.families import examples
from neurondrift.interventions.acting.freezing import freeze
from neurondrift.models.batches import make_batches, token_losses
from neurondrift.models.masked_lora import lora_factors
from neurondrift.models.parts import weights_of_units
from neurondrift.models.sites import linear_sites, mlp_units


def mask_of(model, group):
    """Site name -> bool `[out, in]`, built independently of the code under test."""
    sites = linear_sites(model)
    shapes = {name: site.shape for name, site in sites.items()}
    if group.granularity == "unit":
        group = weights_of_units(group, mlp_units(sites), shapes)
    masks = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}
    for name, members in group.members.items():
        if group.granularity == "weight":
            masks[name].view(-1)[torch.from_numpy(members)] = True
        else:
            masks[name][torch.from_numpy(members)] = True
    return masks


def effective(model):
    """Site name -> W₀ + Δ in float64, Δ as the layers' own factors give it; and Δ."""
    total, change = {}, {}
    for name, site in linear_sites(model).items():
        delta = torch.zeros(site.shape)
        for each in lora_factors(site):
            delta = delta + each.delta()
        total[name], change[name] = site.weight.double() + delta.double(), delta
    return total, change


def weights(model):
    return {name: site.weight.clone() for name, site in linear_sites(model).items()}


def loss_of(model, rows):
    (batch,) = make_batches(rows, model=model, batch_size=len(rows), pad_token_id=0)
    return token_losses(model, batch).losses.mean()


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.05),
}


def train(model, group, *, steps=4, optimizer="adamw", accumulation=1, clip=1.0):
    """A plain loop under `with freeze`; losses before and after."""
    rows = examples(6)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[optimizer](trained)
    model.train()
    with torch.no_grad():
        before = loss_of(model, rows)
    with freeze(model, group) as frozen:
        for _ in range(steps):
            for part in range(accumulation):
                (loss_of(model, rows[part::accumulation]) / accumulation).backward()
            torch.nn.utils.clip_grad_norm_(trained, clip)
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        return frozen, float(before), float(loss_of(model, rows))


def check_frozen(model, before, group, trained=None):
    masks, (after, change) = mask_of(model, group), effective(model)
    free_moved = 0
    for name, old in before.items():
        mask = masks[name]
        assert torch.equal(after[name][mask], old.double()[mask]), name
        assert not change[name][mask].any(), name
        if trained is None or any(word in name for word in trained):
            free_moved += int((after[name] != old.double())[~mask].sum())
    assert free_moved > 0
    return masks
