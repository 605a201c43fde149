"""The sentences, names and questions of needles.

The evaluation has its own wordings.  A calibration that hides numbers in text uses others, so that a measured needle has
neither a sentence nor a name in common with what the gates were fitted to: `shared(EVALUATION, others)` is then empty.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """One way to state a fact and to ask for it.

    statement: with {value}, and {field} and {key} if it has them.  question: the beginning of a sentence that the value
    continues, after a space.
    """

    statement: str
    question: str


@dataclass(frozen=True)
class Wordings:
    """All that needles are made of.

    filler: sentences that are repeated around a pass key.  pass_keys: wordings without key and field.
    facts: wordings with {key} (who) and {field} (which number).
    """

    filler: tuple[str, ...]
    pass_keys: tuple[Wording, ...]
    facts: tuple[Wording, ...]
    keys: tuple[str, ...]
    fields: tuple[str, ...]

    def phrases(self) -> set[str]:
        """All texts of it."""
        wordings = (text for one in (*self.pass_keys, *self.facts) for text in (one.statement, one.question))
        return {*self.filler, *self.keys, *self.fields, *wordings}


def shared(one: Wordings, other: Wordings) -> set[str]:
    """The texts that both have, in any case of letters."""
    folded = {text.casefold() for text in other.phrases()}
    return {text for text in one.phrases() if text.casefold() in folded}


EVALUATION = Wordings(
    filler=(
        "The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.",
    ),
    pass_keys=(
        Wording(
            "The pass key is {value}. Remember it. {value} is the pass key.",
            "What is the pass key? The pass key is",
        ),
    ),
    facts=(
        Wording("The {field} of {key} is {value}.", "The {field} of {key} is"),
        Wording("{key} was given the {field} {value}.", "As written above, {key} was given the {field}"),
        Wording(
            "Please note that the {field} of {key} is {value}.",
            "Question: what is the {field} of {key}?\nAnswer: the {field} of {key} is",
        ),
    ),
    keys=(
        "Ada Marsh", "Ben Okoro", "Clara Nilsson", "David Ferreira", "Elif Kaya", "Frank Osei", "Grace Tanaka",
        "Hugo Lindqvist", "Ines Moreau", "Jonas Weber", "Kofi Mensah", "Lena Petrova", "Marco Rossi", "Nadia Haddad",
        "Oscar Blom", "Priya Nair",
    ),
    fields=("badge number", "account number", "locker number", "ticket number", "file number", "phone extension"),
)  # fmt: skip
