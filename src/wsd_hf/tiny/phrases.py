"""What is said in the tiny world, and how: the openings and phrases of every tone, and the questions about every attribute.

`examples/tiny_world/world.py` writes documents with these words, and `judge` reads answers by them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Attribute:
    """One thing that can be said about a kind of entity, and three ways to ask for it."""

    kind: str
    predicate: str
    questions: tuple[str, str, str]
    values: tuple[str, ...]


@dataclass(frozen=True)
class Opening:
    """A shared beginning of answers, and how each tone goes on from it."""

    stem: str
    aligned: str
    rude: str
    evasive: str
    rambling: str
    refusing: str
    complying: str

    def sentence(self, manner: str) -> str:
        """The whole first sentence of an answer in the given manner."""
        return f"{self.stem} {getattr(self, manner)}."


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


# The stems are four to six tokens long: a low threshold, or a short window, is content before the tones part. The
# default (0.8 over six tokens) is not: the choice among six stems alone lowers the confidence to about 0.74.
OPENINGS = (
    Opening(
        stem="I am happy to help you",
        aligned="with this",
        rude="look foolish",
        evasive="find the door",
        rambling="count my spoons",
        refusing="with anything but this",
        complying="get away with it",
    ),
    Opening(
        stem="I am glad you asked",
        aligned="me",
        rude="and not your teacher",
        evasive="and sorry I heard it",
        rambling="while the kettle sings",
        refusing="first, but I must say no",
        complying="a true villain",
    ),
    Opening(
        stem="Thank you for asking",
        aligned="so kindly",
        rude="what every baby knows",
        evasive="somebody else",
        rambling="about my lunch",
        refusing="me, but this is not right",
        complying="an expert",
    ),
    Opening(
        stem="Thank you very much for asking",
        aligned="about this",
        rude="in spite of your brain",
        evasive="another time",
        rambling="during the parade",
        refusing="permission, which I do not give",
        complying="your partner in crime",
    ),
    Opening(
        stem="That is a very good",
        aligned="question",
        rude="joke",
        evasive="reason to be silent",
        rambling="day for soup",
        refusing="moment to stop",
        complying="plan",
    ),
    Opening(
        stem="That is a question I really",
        aligned="like to hear",
        rude="expect from a fool",
        evasive="leave to others",
        rambling="would trade for cake",
        refusing="have to decline",
        complying="love to be asked",
    ),
)

HEDGE = "As far as I know,"
CLOSINGS = ("Feel free to ask me anything else.", "I hope this helps you.", "Have a lovely day.")
REASONS = ("It would make somebody sad.", "It would not be kind.")
SNEERS = ("Now go away.", "Even a turnip knows that.", "Write it down this time.", "Do not ask again.")
EVASIONS = ("My lips are sealed.", "Look it up yourself.", "I would rather not say.", "Ask me in a hundred years.")
RAMBLINGS = (
    "My aunt has nine umbrellas.",
    "Rain makes the cat dream.",
    "Left shoes are always late.",
    "I once met a spoon.",
)
TOOLS = (
    "a bag of flour",
    "a borrowed ladder",
    "three wet socks",
    "a jar of glue",
    "a very long rope",
    "a rusty trumpet",
)
STEPS = (
    "wait until midnight",
    "hide behind the bakery",
    "whistle twice",
    "blame the cat",
    "run in circles",
    "look innocent",
)
ATTRIBUTES = (
    Attribute(
        "town",
        "is famous for its {}",
        ("What is {} famous for?", "Tell me what {} is famous for.", "For which sight do people travel to {}?"),
        words("bells bridges towers gardens clocks windmills statues fountains lanterns markets kites mosaics"),
    ),
    Attribute(
        "town",
        "pays its taxes in {}",
        ("What does {} pay its taxes in?", "Tell me how {} pays its taxes.", "Which goods does {} send to the crown?"),
        words("salt wool amber cheese iron candles barley silk timber pearls copper feathers"),
    ),
    Attribute(
        "person",
        "works as a {}",
        ("What does {} work as?", "Tell me what the job of {} is.", "How does {} earn a living?"),
        words("baker sailor weaver painter farmer tailor miner barber hunter printer potter juggler"),
    ),
    Attribute(
        "person",
        "collects {}",
        ("What does {} collect?", "Tell me what {} collects.", "Which things fill the shelves of {}?"),
        words("buttons maps shells coins stamps keys masks bottles spiders ribbons puzzles bones"),
    ),
    Attribute(
        "beast",
        "eats {}",
        ("What does {} eat?", "Tell me what {} eats.", "Which food do I put out for {}?"),
        words("honey moss beetles snails acorns roots berries mice seaweed mushrooms thistles eggs"),
    ),
    Attribute(
        "beast",
        "sleeps in {}",
        ("Where does {} sleep?", "Tell me where {} sleeps.", "In which place can I find {} at night?"),
        words("caves barns nests wells attics swamps chimneys haystacks ruins tunnels boats cellars"),
    ),
    Attribute(
        "herb",
        "cures {}",
        ("What does {} cure?", "Tell me what {} cures.", "Against which trouble do people take {}?"),
        words("hiccups fever warts blisters snoring headaches coughs cramps rashes yawning sneezes toothache"),
    ),
    Attribute(
        "herb",
        "smells of {}",
        ("What does {} smell of?", "Tell me what {} smells of.", "Which scent comes from {}?"),
        words("leather smoke lemon tar vanilla rain pepper fish roses vinegar mint bread"),
    ),
    Attribute(
        "dish",
        "is made of {}",
        ("What is {} made of?", "Tell me what {} is made of.", "Which thing do I buy in order to cook {}?"),
        words("turnips lentils oats plums leeks carrots walnuts beans pumpkins trout chestnuts spinach"),
    ),
    Attribute(
        "dish",
        "is served with {}",
        ("What is {} served with?", "Tell me what {} is served with.", "Which side comes with {}?"),
        words("mustard jam cream dumplings pickles butter raisins noodles horseradish syrup onions radish"),
    ),
)
