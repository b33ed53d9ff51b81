"""What the report says of interventions, as one paragraph."""

from neurondrift.interventions.outcomes import causes
from neurondrift.report.causes import intervention_sentences


def paragraph(effects, references):
    found = [cause._asdict() for cause in causes(effects, references)]
    return " ".join(intervention_sentences(effects, references, found))
