"""The quickstart's dataset: support tickets to JSON, from a seed.

    python -m examples.tickets data

A ticket is put together from a greeting, a request, a remark on its urgency and a close. Training and held-out rows
share no phrase of any of these, and a quarter of the held-out products never occur in training: a model that answers
held-out rows has learned the task, not the sentences. `data/handwritten.jsonl` was written by hand, row by row.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

SYSTEM = (
    'Reply to the ticket with JSON only: {"intent": refund|order_status|cancel_order|change_address|damaged_item|'
    'wrong_item|login_problem|invoice|warranty|product_question, "product": name|null, "order": number|null, '
    '"urgency": low|normal|high}'
)

PRODUCTS = (
    "desk lamp", "coffee grinder", "rain jacket", "electric kettle", "yoga mat", "phone case", "office chair",
    "garden hose", "bike helmet", "bluetooth speaker", "travel pillow", "frying pan", "wall clock", "running shoes",
    "power bank", "water bottle", "book shelf", "hair dryer", "wool blanket", "camping stove", "tool box",
    "laptop sleeve", "cutting board", "night light", "pressure cooker", "hiking boots", "picture frame", "shower head",
    "baby monitor", "espresso machine", "floor mat", "salad bowl", "ski gloves", "window blind", "hand mixer",
    "sleeping bag", "car charger", "desk fan", "measuring tape", "ice bucket", "tennis racket", "piano stool",
    "rice cooker", "lunch box", "fire pit", "swim goggles", "shoe rack", "tablet stand", "garlic press", "door mat",
    "wool scarf", "keyboard", "headphones", "umbrella", "toaster", "backpack", "screwdriver", "mirror", "printer",
    "vacuum cleaner", "bed sheet", "curtain rod", "mouse pad", "pepper mill",
)  # fmt: skip
UNSEEN_PRODUCTS = (
    "air fryer", "dog leash", "standing desk", "sewing machine", "beach towel", "smart plug", "tea set",
    "mountain tent", "guitar strap", "bread knife",
)  # fmt: skip

# {p} is "the desk lamp" or a word such as "my item"; {o} is "order KD-48213" or nothing.
REQUESTS: dict[str, tuple[list[str], list[str]]] = {
    "refund": (
        [
            "I would like a refund for {p}{o}.",
            "Please give me my money back for {p}{o}.",
            "I sent back {p}{o} and still wait for the refund.",
            "How do I get a refund for {p}{o}?",
            "I returned {p}{o} two weeks ago and have not seen the money.",
            "I am not happy with {p}{o} and want to be refunded.",
            "{P} is not for me{o}. I want my money back, please.",
            "Can you pay back what I spent on {p}{o}?",
            "The money for {p}{o} is not on my account yet, although you have it back.",
            "Please return the purchase price of {p}{o}.",
            "My card was not credited after I gave {p} back{o}.",
            "I used my right of return for {p}{o}. Please pay me back.",
            "You still owe me the price of {p}{o}.",
            "Is my refund for {p}{o} on its way?",
            "I sent {p} back to you and expect the money{o}.",
            "Please credit my card for {p}{o}.",
            "I do not like {p}{o}, so I would like my money back.",
        ],
        [
            "Kindly reimburse me for {p}{o}.",
            "The return of {p}{o} arrived at your place, so where is my refund?",
            "I changed my mind about {p}{o} and ask for my money back.",
            "When will the amount for {p}{o} be refunded to my card?",
        ],
    ),
    "order_status": (
        [
            "Where is {p}{o}?",
            "Can you tell me when {p}{o} will arrive?",
            "I have not received {p}{o} yet. What is the status?",
            "Has {p}{o} been shipped?",
            "The tracking page shows nothing for {p}{o}. When does it come?",
            "I am still waiting for {p}{o} to be delivered.",
            "What is the delivery date of {p}{o}?",
            "{P} should have been here last week{o}. Where is the parcel?",
            "Did you send {p}{o} already?",
            "It has been ten days and {p}{o} is not here.",
            "Please tell me where {p}{o} is at the moment.",
            "Is there any news about the shipment of {p}{o}?",
            "The courier did not come with {p}{o}. When will it be delivered?",
            "My parcel has not come: {p}{o}. Where is it?",
            "I expected {p}{o} on Monday and there is still no parcel.",
            "Is {p}{o} with the courier already?",
            "How long will it take until {p}{o} gets here?",
        ],
        [
            "Is {p}{o} on its way already?",
            "Could you check how far {p}{o} has got? It was not delivered so far.",
            "My parcel with {p}{o} has not turned up. When can I expect it?",
            "Please send me the shipping status of {p}{o}.",
        ],
    ),
    "cancel_order": (
        [
            "Please cancel {p}{o}.",
            "I want to cancel my purchase of {p}{o}.",
            "I ordered {p}{o} by mistake, please cancel it.",
            "Can I still cancel {p}{o} before it ships?",
            "Stop {p}{o}, I do not need it any more.",
            "I no longer want {p}{o}. Cancel it, please.",
            "Please take {p} off my list of purchases and cancel it{o}.",
            "How can I cancel {p}{o}?",
            "I found {p} cheaper elsewhere, please cancel it{o}.",
            "Please do not send {p}{o} any more.",
            "Kindly withdraw my purchase of {p}{o}.",
            "I have changed my plans, so please drop {p}{o} from what I ordered before you ship it.",
            "That was a double order: please cancel {p}{o}.",
            "Is it possible to call off {p}{o}?",
            "I would like to undo my purchase of {p}{o} before it leaves your store.",
            "By accident I bought {p} two times, cancel one{o}.",
            "Do not deliver {p}{o}, I have no use for it now.",
        ],
        [
            "Do not ship {p}{o}, I would like to call the purchase off.",
            "Kindly cancel what I bought: {p}{o}.",
            "I clicked twice on {p}{o}. Cancel this one.",
            "Is it too late to cancel {p}{o}?",
        ],
    ),
    "change_address": (
        [
            "I moved. Please send {p}{o} to my new address.",
            "Can you change the delivery address of {p}{o}?",
            "The shipping address for {p}{o} is wrong, please correct it.",
            "Please deliver {p}{o} to my office instead of my home.",
            "I typed the wrong street for {p}{o}. Can you fix the address?",
            "Please update the address for {p}{o}.",
            "{P} must go to another address{o}.",
            "I need {p}{o} to be sent to a different address.",
            "Send {p}{o} to my parents' place, please.",
            "My street has a new name, can you change where {p}{o} goes?",
            "I will be away, so please have {p}{o} brought to a neighbour.",
            "The postcode for {p}{o} is not right. Please put it right.",
            "Please ship {p}{o} to my work and not to the place that you have on file.",
            "Could you bring {p}{o} to my sister's house?",
            "Please redirect {p}{o} to a pick-up shop.",
            "{P} should go to my office address{o}.",
            "The house number that I gave for {p}{o} is wrong.",
        ],
        [
            "We live somewhere else now, so please ship {p}{o} to the new address.",
            "There is a mistake in the house number where {p}{o} should go. Please change it.",
            "Could {p}{o} be redirected to my neighbour's address?",
            "Use my work address for {p}{o}, not the one on file.",
        ],
    ),
    "damaged_item": (
        [
            "{P} arrived broken{o}.",
            "{P} came with a crack{o}.",
            "The box was crushed and {p}{o} is damaged.",
            "I unpacked {p}{o} and it is scratched all over.",
            "{P} was damaged in transport{o}.",
            "I received {p}{o} in pieces.",
            "A part of {p}{o} was broken when I opened the parcel.",
            "{P} has a dent, it must have happened on the way{o}.",
            "The parcel had a hole and {p}{o} is bent.",
            "{P} was cracked when it came out of the box{o}.",
            "The package was fine outside, but {p}{o} is shattered.",
            "The delivery man dropped {p}{o} and now it is broken.",
            "There is a scratch across {p}{o}, straight out of the box.",
            "The corner of {p}{o} was broken on arrival.",
            "{P} got smashed during delivery{o}.",
            "There are scratches on {p}{o}, which I just unpacked.",
            "The courier threw the parcel, and {p}{o} is in bits.",
        ],
        [
            "When I opened the parcel, {p}{o} was smashed.",
            "{P} reached me with a broken corner{o}.",
            "The courier damaged {p}{o}, there is a big scratch.",
            "My delivery was dropped, it seems: {p}{o} is cracked.",
        ],
    ),
    "wrong_item": (
        [
            "I got something else instead of {p}{o}.",
            "You sent me the wrong item, I ordered {p}{o}.",
            "I ordered {p}{o} but a different article was in the box.",
            "This is not what I bought: I bought {p}{o}.",
            "{P} came in the wrong colour{o}.",
            "Wrong size: {p}{o} is not the one I chose.",
            "The parcel for {p}{o} holds the wrong product.",
            "Instead of {p}{o} there was another thing in the parcel.",
            "I did not order this, I ordered {p}{o}.",
            "Inside the box for {p}{o} was somebody else's article.",
            "I received a different model than {p} that I chose{o}.",
            "It is the wrong version of {p}{o}.",
            "What came is not {p}{o}, but another product.",
            "There was a mix of orders: this is not {p}{o}.",
            "I opened the parcel and found another article, not {p}{o}.",
            "You delivered the wrong thing, not {p}{o}.",
            "The box is labelled {p}{o} but something else is in it.",
        ],
        [
            "There must be a mix-up: I chose {p}{o} and received another article.",
            "The box says {p}{o}, but inside is the wrong item.",
            "I was sent the wrong model of {p}{o}.",
            "What you delivered is not {p} that I ordered{o}.",
        ],
    ),
    "login_problem": (
        [
            "I cannot log in to my account to see {p}{o}.",
            "My password does not work, so I cannot look at {p}{o}.",
            "I forgot my password and need to check {p}{o}.",
            "The login page gives an error when I want to see {p}{o}.",
            "My account is locked and I cannot find {p}{o}.",
            "The reset link never comes, and I need to get to {p}{o} in my account.",
            "I can't sign in any more. I wanted to look up {p}{o}.",
            "Your site says my user name is unknown, but I bought {p}{o} with it.",
            "I am unable to sign in and check {p}{o}.",
            "The site refuses my password, so {p}{o} is out of reach.",
            "I never get the mail for a new password, and I want to see {p}{o}.",
            "After three tries my account was blocked. I only wanted to view {p}{o}.",
            "Logging in fails with an error. I have to look at {p}{o}.",
            "My sign-in is refused, so I cannot open {p}{o}.",
            "I am locked out and cannot view {p}{o}.",
            "Access to my account is denied, and I must check {p}{o}.",
            "The password mail does not arrive and {p}{o} is in my account.",
        ],
        [
            "Signing in fails each time I try to view {p}{o}.",
            "I am locked out of my account, and {p}{o} is in there.",
            "No mail arrives to reset my password, so I can't check {p}{o}.",
            "My login is refused although I used it to buy {p}{o}.",
        ],
    ),
    "invoice": (
        [
            "Please send me the invoice for {p}{o}.",
            "I need a receipt for {p}{o}.",
            "Where can I download the bill for {p}{o}?",
            "The invoice for {p}{o} is missing.",
            "My company needs an invoice with VAT for {p}{o}.",
            "Can I have the invoice of {p}{o} as a PDF?",
            "The name on the invoice for {p}{o} is wrong, please make a new one.",
            "I did not get any receipt for {p}{o}.",
            "Can you mail me the bill of {p}{o}?",
            "I must hand in a receipt for {p}{o} at work.",
            "Please issue an invoice for {p}{o}.",
            "There is no invoice in my account for {p}{o}.",
            "Please print me another receipt for {p}{o}.",
            "The tax office wants to see a bill for {p}{o}.",
            "Please attach the invoice for {p}{o} to a mail.",
            "I lost the receipt for {p}{o}, can I have it again?",
            "No bill came along with {p}{o}.",
        ],
        [
            "For my taxes I need the bill of {p}{o}.",
            "Could you mail me a copy of the invoice of {p}{o}?",
            "There was no receipt in the parcel with {p}{o}, please send one.",
            "Our accounting asks for an invoice of {p}{o}.",
        ],
    ),
    "warranty": (
        [
            "{P} stopped working after three months{o}. Is it under warranty?",
            "Does the warranty cover {p}{o}?",
            "I want to make a warranty claim for {p}{o}.",
            "{P} broke after a year of use, how does the guarantee work{o}?",
            "How long is the warranty on {p}{o}?",
            "Half a year after I bought it, {p}{o} does not switch on any more. Please repair it under warranty.",
            "Please repair {p}{o} under the guarantee.",
            "{P} failed within the warranty period{o}.",
            "{P} worked for nine months and then died{o}. I want to use the guarantee.",
            "Is it free to have {p}{o} repaired? It is less than two years old and has stopped working.",
            "{P} gave out last week, it should still be covered by warranty{o}.",
            "What does the guarantee of {p}{o} include?",
            "How do I claim the warranty for {p}{o}? It quit after half a year.",
            "Do I pay for the repair of {p}{o}, or does the guarantee?",
            "{P} gave up after ten months, please fix it under guarantee{o}.",
            "I would like to use the warranty for {p}{o}, it no longer works.",
            "A year after I bought {p} it is dead{o}. Does the warranty help?",
        ],
        [
            "After eight months of use {p}{o} gave up. I would like to use my warranty.",
            "Is a repair of {p}{o} free under the guarantee?",
            "{P} died last month, well inside the warranty{o}.",
            "What do I have to do for a warranty repair of {p}{o}?",
        ],
    ),
    "product_question": (
        [
            "Can {p}{o} be used outdoors?",
            "What material is {p}{o} made of?",
            "Is {p}{o} safe for children?",
            "How do I clean {p}{o}?",
            "How heavy is {p}{o}?",
            "Does {p}{o} come with instructions in English?",
            "How do I set up {p}{o}?",
            "Is {p}{o} also available in blue?",
            "Which size is {p}{o}?",
            "How big is {p}{o}?",
            "Can I wash {p}{o} in the machine?",
            "Which spare parts can I get for {p}{o}?",
            "Please explain to me how {p}{o} works.",
            "How do I use {p}{o}?",
            "What can I put into {p}{o}?",
            "Does {p}{o} fit a small room?",
            "Can {p}{o} get wet?",
            "How wide and how high is {p}{o}?",
            "Are there accessories for {p}{o}?",
        ],
        [
            "What are the measurements of {p}{o}?",
            "May I wash {p}{o} with hot water?",
            "Which accessories fit {p}{o}?",
            "Can you explain how to use {p}{o}?",
        ],
    ),
}

URGENCY: dict[str, tuple[list[str], list[str]]] = {
    "high": (
        [
            "This is urgent.",
            "I need this solved today.",
            "Please hurry, I leave tomorrow.",
            "It cannot wait.",
            "Please answer as soon as possible.",
            "I need help immediately.",
            "This has to be settled within the day.",
            "I am under a lot of pressure here.",
            "I have to know right now.",
            "It is an emergency.",
            "Every hour counts.",
            "Please deal with this at once, it is very important to me.",
            "I need a reply before tonight.",
            "Please treat this with priority.",
            "I cannot wait any longer.",
            "Help me fast, please.",
            "It has to happen today.",
            "Please react immediately.",
            "There is no time to lose.",
            "My deadline is tomorrow morning.",
            "I expect an answer this afternoon.",
            "ASAP, please!",
            "Please be fast.",
            "This is pressing.",
            "We need it by tomorrow.",
            "I am in a great hurry.",
            "The party is tonight, so please rush.",
            "An answer this minute would be great.",
            "I need to know before the shop closes today.",
            "Drop everything else, please.",
            "Tomorrow is too late.",
        ],
        [
            "Please act right away, this is very urgent.",
            "I must have an answer within the next hours.",
            "Quickly, please, time is running out.",
        ],
    ),
    "low": (
        [
            "There is no rush.",
            "Whenever you have time.",
            "This is not urgent.",
            "It can wait until next week.",
            "Answer when it suits you.",
            "No need to hurry.",
            "Any time this month is fine.",
            "It is not important, just when you get to it.",
            "I am in no hurry at all.",
            "Some day in the coming weeks is fine.",
            "Please do not stress over this.",
            "You have time with it.",
            "Please take all the time you need.",
            "This is nothing urgent.",
            "It is not a priority for me.",
            "I can wait.",
            "There is plenty of time.",
            "An answer by the end of the year will do.",
            "Do it at your leisure.",
            "Some time later this season is okay.",
            "Nothing about this is urgent.",
            "Do not hurry on my account.",
            "I do not need it soon.",
            "It does not matter when.",
            "Feel free to answer late.",
            "Even a reply in three weeks is all right.",
            "This has low priority.",
            "No pressure from my side.",
            "You may deal with more important things first.",
            "In a month or two I will need to know.",
            "As I said, there is lots of time.",
            "Slowly, please, there is no deadline.",
            "Next week is fine.",
            "It is for a birthday in half a year.",
            "A reply within two weeks is good.",
            "We only need it in spring.",
            "The event is five months away.",
            "I am on holiday for three weeks anyway.",
            "Any day of the coming month will do.",
            "An answer in ten days would be quick enough.",
            "Let me know by the end of the month, that leaves time.",
            "I can live without it until winter.",
            "Later this year would be fine too.",
            "A late answer is no problem.",
        ],
        [
            "Take your time with this.",
            "It is not pressing at all.",
            "An answer next month is early enough.",
        ],
    ),
    "normal": (
        [
            "",
            "",
            "",
            "",
            "",
            "",
            "",
            "Please let me know.",
            "Thanks for your help.",
            "I am waiting for your reply.",
            "Could you help me?",
            "Please write back.",
            "Looking forward to hearing from you.",
            "Tell me what to do.",
            "I hope you can help.",
            "What do you suggest?",
            "I would be glad to hear from you.",
            "Please look into it.",
        ],
        ["", "", "I look forward to your answer."],
    ),
}

GREETINGS = (
    [
        "",
        "",
        "Hi,",
        "Hello,",
        "Dear team,",
        "Good morning,",
        "Hello support,",
        "Good day,",
        "Hi there,",
        "Dear Sir or Madam,",
    ],
    ["", "Hey there,", "Good evening,", "To whom it may concern,"],
)
CLOSES = (
    [
        "",
        "",
        "Thank you",
        "Best regards, Anna",
        "Thanks, Tom",
        "Kind regards",
        "Regards, M. Weber",
        "Greetings, Lee",
        "Thank you, Fatima",
        "Best, J. Novak",
        "Sincerely, Ines",
    ],
    ["", "Many thanks, Priya", "Cheers, Sam", "Yours, L. Okafor"],
)
NO_PRODUCT = (
    ["my item", "my purchase", "the article", "it", "the goods", "the stuff I ordered"],
    ["what I bought", "the thing"],
)
ORDER_FORMS = (
    [", order {o}", " (order {o})", ", order number {o}", " ({o})", ", reference {o},", " from order {o}", " [{o}]"],
    [", my order is {o}", " (no. {o})"],
)


def ticket(rng: random.Random, heldout: bool) -> dict[str, list[dict[str, str]]]:
    """Return one row: system message, ticket, answer."""
    side = int(heldout)
    intent, urgency = rng.choice(list(REQUESTS)), rng.choice(list(URGENCY))
    products = UNSEEN_PRODUCTS if heldout and rng.random() < 0.25 else PRODUCTS
    product = rng.choice(products) if rng.random() < 0.85 else None
    letters = "".join(rng.choices("ABCDEFGHKLMNPRSTUVWXZ", k=2))
    order = f"{letters}-{rng.randint(10000, 99999)}" if rng.random() < 0.7 else None

    noun = rng.choice(["the ", "my "]) + product if product else rng.choice(NO_PRODUCT[side])
    mention = rng.choice(ORDER_FORMS[side]).format(o=order) if order else ""
    request = rng.choice(REQUESTS[intent][side]).format(p=noun, P=noun[0].upper() + noun[1:], o=mention)
    parts = [rng.choice(GREETINGS[side]), request, rng.choice(URGENCY[urgency][side]), rng.choice(CLOSES[side])]
    answer = {"intent": intent, "product": product, "order": order, "urgency": urgency}
    return row(" ".join(part for part in parts if part), answer)


def row(text: str, answer: dict[str, str | None]) -> dict[str, list[dict[str, str]]]:
    """Return a ticket and its answer as a chat."""
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": text},
            {"role": "assistant", "content": json.dumps(answer)},
        ]
    }


def write(path: Path, count: int, seed: int, heldout: bool) -> None:
    """Write `count` different tickets."""
    rng, seen = random.Random(seed), set[str]()
    with path.open("w", encoding="utf-8") as file:
        while len(seen) < count:
            line = json.dumps(ticket(rng, heldout), ensure_ascii=False)
            if line not in seen:
                seen.add(line)
                file.write(line + "\n")


def main(folder: str) -> None:
    """Write train.jsonl (2,000 rows) and heldout.jsonl (240 rows)."""
    Path(folder).mkdir(exist_ok=True)
    write(Path(folder, "train.jsonl"), 2000, seed=1, heldout=False)
    write(Path(folder, "heldout.jsonl"), 240, seed=2, heldout=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "data")
