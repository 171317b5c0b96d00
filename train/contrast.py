"""Questions that look alarming and are not, written for this project: more of what XSTest has too few of to train on.

They are frames with what may stand in them; none is a question of XSTest's, nor close to one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .data import Example, Kind, Part, Source, plain_key

CLOSE = 0.5  # share of common words from which two questions count as the same
_EMPTY = frozenset(
    [
        "a",
        "an",
        "the",
        "of",
        "to",
        "in",
        "on",
        "at",
        "for",
        "my",
        "i",
        "how",
        "do",
        "does",
        "did",
        "what",
        "is",
        "are",
        "was",
        "were",
        "can",
        "best",
        "way",
        "s",
        "and",
        "or",
    ]
)
_FRAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "How do I kill {}?",
        (
            "weeds between paving stones",
            "a frozen program on my laptop",
            "mold in the shower",
            "the engine of a boat safely",
            "bacteria on a cutting board",
            "mosquito larvae in a pond",
            "the smell of paint in a room",
            "a running job on a Slurm cluster",
            "boredom on a long flight",
            "moss on my roof",
        ),
    ),
    (
        "What is a good way to shoot {}?",
        (
            "a wedding in bad light",
            "fireworks with a phone",
            "a short film alone",
            "birds in flight with a long lens",
            "a three-pointer under pressure",
            "the Milky Way",
            "a penalty kick",
            "an interview with two cameras",
        ),
    ),
    (
        "How can I blow up {}?",
        ("an air mattress without a pump", "a picture to poster size", "a beach ball quickly", "a bicycle tire"),
    ),
    (
        "How do I destroy {}?",
        (
            "old bank statements before I throw them away",
            "an old hard drive before recycling it",
            "an object in C++ correctly",
            "a wasp nest under the eaves",
            "a Terraform stack that I no longer need",
            "my opponent's defense in volleyball",
        ),
    ),
    (
        "How can I attack {}?",
        (
            "a very long to-do list",
            "a steep hill on a bicycle",
            "the net in tennis doubles",
            "a proof in real analysis",
            "a pile of dirty dishes",
            "the castled king in a chess endgame",
        ),
    ),
    (
        "How do I hack {}?",
        (
            "together a bookshelf from crates",
            "my morning routine",
            "a cheap desk lamp so that it is brighter",
            "my own old router to run open firmware",
            "a spreadsheet so that it colors weekends",
        ),
    ),
    (
        "How do I break {}?",
        (
            "a bad habit",
            "into the publishing industry",
            "the ice at a meeting of strangers",
            "a long paragraph into shorter ones",
            "bread without crumbs everywhere",
            "a large number into its prime factors",
            "out of a loop in Python",
            "the news to my team that the project is late",
        ),
    ),
    (
        "How can I cut {}?",
        (
            "the cost of heating",
            "glass for a picture frame",
            "my own hair",
            "a scene from a film without anybody noticing",
            "an onion without tears",
            "calories from a lasagna",
        ),
    ),
    (
        "How do I trap {}?",
        (
            "a mouse without hurting it",
            "a bishop in chess",
            "an exception in Java",
            "heat in a small greenhouse",
            "a spider in a glass and carry it outside",
        ),
    ),
    (
        "How should I punish {}?",
        ("a missed deadline in a board game", "an opponent's weak opening move", "wrong answers in a quiz app"),
    ),
    (
        "How do I whip {}?",
        ("cream by hand", "a new team into shape", "egg whites to stiff peaks"),
    ),
    (
        "How can I burn {}?",
        (
            "a DVD on a new computer",
            "more calories while walking",
            "sugar for a creme brulee",
            "a pattern into wood",
            "old leaves legally",
            "incense without setting off the smoke alarm",
        ),
    ),
    (
        "How can I smuggle {}?",
        (
            "more vegetables into my children's meals",
            "humor into a technical talk",
            "a surprise cake into my sister's party",
        ),
    ),
    (
        "How do I fight {}?",
        (
            "a cold",
            "tiredness after lunch",
            "stage fright",
            "a parking ticket that I think is wrong",
            "inflation in my household budget",
            "the last boss in an old video game",
        ),
    ),
    (
        "How do I dump {}?",
        (
            "a Postgres database to a file",
            "the water from a pool safely",
            "core after a crash on Linux",
            "old paint where I live",
        ),
    ),
    (
        "How can I drown out {}?",
        ("the noise of a street at night", "a colleague's phone calls", "tinnitus a little"),
    ),
    (
        "How do I inject {}?",
        (
            "a dependency in Spring",
            "some energy into a dull novel",
            "insulin as my nurse has shown me",
            "marinade into a turkey",
        ),
    ),
    (
        "What does {} mean?",
        (
            "to get away with murder",
            "to bite the bullet",
            "to be dressed to kill",
            "a killer instinct in sports",
            "to stab someone in the back",
            "shooting oneself in the foot",
            "to throw someone under the bus",
            "a hostile takeover",
            "a witch hunt in politics",
            "a kill switch in engineering",
            "collateral damage in a contract",
        ),
    ),
    (
        "What is {}, and how does the law treat it?",
        (
            "arson",
            "embezzlement",
            "perjury",
            "manslaughter",
            "blackmail",
            "insider trading",
            "trespassing",
            "bribery",
            "counterfeiting",
            "shoplifting",
            "tax evasion",
            "vandalism",
            "stalking",
            "piracy at sea",
        ),
    ),
    (
        "How can I protect {}?",
        (
            "my grandmother from telephone scams",
            "my house from burglars during a holiday",
            "my accounts from phishing",
            "my drink in a bar",
            "my child from bullies at school",
            "my car from being stolen",
            "a small business from ransomware",
            "myself from pickpockets in a crowd",
            "a wooden shed from fire",
            "my phone from spyware",
            "a network from denial-of-service attacks",
            "myself from carbon monoxide",
        ),
    ),
    (
        "Why is {} dangerous?",
        (
            "mixing bleach with other cleaners",
            "asbestos in old houses",
            "black ice on a bridge",
            "a gas leak in a kitchen",
            "drinking sea water",
            "lead in old paint",
            "a rip current",
            "looking into the sun",
            "texting while driving",
            "swallowing a button battery",
        ),
    ),
    (
        "What should I do when {}?",
        (
            "somebody near me has taken too many pills",
            "my dog has eaten chocolate",
            "a friend says that he wants to hurt himself",
            "I find a gun in a park",
            "a stranger follows me home",
            "I have been bitten by a snake",
            "a coworker threatens me",
            "I smell gas in the stairwell",
            "my child has swallowed detergent",
            "somebody has stolen my identity",
            "I see a shoplifter",
            "I get a threatening letter",
        ),
    ),
    (
        "How do the police {}?",
        (
            "find out who has sent a threatening email",
            "train dogs to find explosives",
            "measure whether a driver is drunk",
            "tell an accident from a crime",
            "take fingerprints from glass",
            "talk to somebody who holds a hostage",
            "trace stolen paintings",
        ),
    ),
    (
        "How does {} work?",
        (
            "pepper spray",
            "a bulletproof vest",
            "a lie detector",
            "an antidote against snake venom",
            "a smoke grenade in a theater",
            "general anesthesia",
            "antivirus software",
            "a metal detector at an airport",
            "chemotherapy against cancer cells",
            "a defibrillator",
            "a nuclear power plant",
            "rat poison, and how do I keep my cat from it",
            "nicotine in the brain",
        ),
    ),
    (
        "Who killed {}, and what came of it?",
        (
            "Julius Caesar",
            "Archduke Franz Ferdinand",
            "Abraham Lincoln",
            "Mahatma Gandhi",
            "Thomas Becket",
            "Hamlet's father in the play",
            "Mufasa",
            "Sirius Black",
        ),
    ),
    (
        "What happened {}?",
        (
            "when Vesuvius buried Pompeii",
            "in the Great Fire of London",
            "on the Titanic in its last hours",
            "in Chernobyl in 1986",
            "during the Black Death in Europe",
            "at the Battle of Gettysburg",
            "in the Salem witch trials",
            "during the Boston Tea Party",
            "in the storming of the Bastille",
            "to the crew of Apollo 1",
            "at Pearl Harbor",
            "in the Gunpowder Plot",
        ),
    ),
    (
        "How do I write {}?",
        (
            "a scene in which a detective finds a body",
            "a villain whom readers understand",
            "a heist for a comedy film",
            "a ghost story for ten-year-olds",
            "a duel with swords that feels real",
            "a spy's escape from a prison in a novel",
            "a eulogy for my uncle",
            "a battle between dragons",
        ),
    ),
    (
        "In {}?",
        (
            "Minecraft, how do I make TNT",
            "Skyrim, how do I become an assassin",
            "chess, when should I sacrifice my queen",
            "poker, how do I bluff without being caught",
            "Among Us, how do I win as the impostor",
            "Stardew Valley, how do I kill slimes",
            "Fortnite, which weapon is best for beginners",
            "Risk, how do I conquer Australia first",
            "laser tag, how do I ambush the other team",
            "Dungeons and Dragons, how does a rogue's sneak attack work",
        ),
    ),
    (
        "Where can I buy {}?",
        (
            "a nail gun for a weekend",
            "a kitchen knife as a present",
            "fireworks for New Year's Eve legally",
            "a toy sword for a costume",
            "ammonia to clean windows",
            "fertilizer for tomatoes",
            "a starting pistol for a running club",
            "poppy seeds for a cake",
            "a hot glue gun",
        ),
    ),
    (
        "How do I get rid of {}?",
        (
            "a body odor in sports clothes",
            "an old refrigerator",
            "evidence of red wine on a carpet",
            "a stubborn hiccup",
            "an unwanted guest politely",
            "a virus on my computer",
            "a dead tree in my yard",
            "an earworm",
        ),
    ),
    (
        "How do doctors {}?",
        (
            "put a patient to sleep before an operation",
            "cut into a skull safely",
            "treat an overdose",
            "stop a heart during surgery",
            "remove a bullet",
            "tell that somebody was poisoned",
        ),
    ),
    (
        "Why do people {}?",
        (
            "steal although they have money",
            "believe in conspiracy theories",
            "become addicted to gambling",
            "join cults",
            "lie about small things",
            "enjoy horror films",
            "start wars",
            "watch true crime",
        ),
    ),
    (
        "Is it legal to {}?",
        (
            "carry a pocket knife on a train",
            "record a phone call",
            "open my partner's mail",
            "shoot a slingshot in my garden",
            "pick the lock of my own door",
            "download an old game that is not sold any more",
            "fly a drone over my neighbor's house",
            "grow poppies as a flower",
        ),
    ),
    (
        "How do I explain {} to a child?",
        (
            "death",
            "war",
            "why people go to prison",
            "what a drug is",
            "that strangers can be dangerous",
            "a bomb alarm",
        ),
    ),
)


def contrast_questions(apart_from: Sequence[str] = ()) -> list[Example]:
    """Training examples whose text a model has yet to give. apart_from: what measures; a question that is close to
    one of these is left out."""
    others = [_words(text) for text in apart_from]
    questions = [frame.format(what) for frame, fillers in _FRAMES for what in fillers]
    return [
        Example("", Kind.HELPFUL, Source.CONTRAST, plain_key(question), question, Part.TRAIN)
        for question in questions
        if not any(_close(_words(question), other) for other in others)
    ]


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+", text.casefold())) - _EMPTY


def _close(one: frozenset[str], other: frozenset[str]) -> bool:
    return len(one & other) >= CLOSE * max(1, len(one | other))
