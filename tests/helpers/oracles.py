"""What the tests compare with, written without the code under test: dense float64 drift, stored inputs."""

import torch

from neurondrift.models.sites import linear_sites


def dense(base, delta):
    """l2, relative and cosine distance of float64 rows, without cancellation: 1 - cos from the sine of the angle."""
    base, delta = base.double(), delta.double()
    norm = base.norm(dim=1)
    unit = base / norm[:, None]
    along = (delta * unit).sum(dim=1)
    angle = torch.atan2((delta - along[:, None] * unit).norm(dim=1), norm + along)
    return delta.norm(dim=1), delta.norm(dim=1) / norm, 2 * torch.sin(angle / 2) ** 2


def check(measured, expected, tolerances=(1e-5, 1e-5, 1e-4)):
    for actual, wanted, tolerance in zip(measured, expected, tolerances, strict=True):
        assert actual.dtype == torch.float32
        assert (
            (actual.double() - wanted).abs() <= tolerance * wanted
        ).all()  # a neuron that has not moved is exactly 0


def stored_inputs(model, rows):
    """Site name -> the inputs of every response token [N, I], by plain hooks, one example at a time, unpadded.

    The inputs of an expert are recorded by running the experts module by hand on what the module was given.
    """
    sites = linear_sites(model)
    seen = {name: [] for name in sites}
    for row in rows:
        response = torch.tensor(row["labels"]) != -100
        response[0] = False
        handles = []

        def plain(name, response=response):
            return lambda module, args, output: seen[name].append(args[0].reshape(len(response), -1)[response])

        def experts(prefix, response=response):
            def hook(module, args, output):
                states, index, _ = args
                for expert in range(module.num_experts):
                    chosen = (index == expert).any(dim=1)
                    taken = states[chosen & response]
                    seen[f"{prefix}.gate_up_proj.{expert}"].append(taken)
                    gate, up = (taken @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
                    seen[f"{prefix}.down_proj.{expert}"].append(module.act_fn(gate) * up)

            return hook

        prefixes = {}
        for name, site in sites.items():
            if site.expert is None:
                handles.append(site.owner.register_forward_hook(plain(name)))
            else:
                prefixes[name.rsplit(".", 2)[0]] = site.owner
        handles += [module.register_forward_hook(experts(prefix)) for prefix, module in prefixes.items()]
        with torch.no_grad():
            model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False)
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts).double().numpy() for name, parts in seen.items()}
