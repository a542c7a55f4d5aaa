"""Productions of the English half of the grammar. A bar separates productions; ``{...}`` are slots."""

# ruff: noqa: SIM905 - words in a row read better than a list literal
from __future__ import annotations

OPENER = """\
Hi|Hi {person}|Hello|Hello {person}|Good morning|Good afternoon|Good evening|Hey|Hey {person}|Dear {person}|\
Dear all|Dear team|Hi team|Hi there|Hello again|Hi everyone|Greetings|Excuse me|Sorry to bother you|Morning|\
Hiya|To whom it may concern|Dear Sir or Madam|Hope you are well|This is {person}|{person} here|Quick one|\
It is {person} again|Good day|Howdy""".split("|")

REQUEST = """\
I need|I need to buy|we need|we need to buy|I want|I want to order|I want to buy|we want|we want to order|\
I would like|I would like to order|I would like to buy|I'd like|I'd like to order|we'd like to order|\
we would like to purchase|I wish to purchase|we wish to buy|send me|send us|please send|please send me|\
please send us|ship me|ship us|please ship|get me|get us|give me|can I get|can we get|can I have|could I get|\
could we have|could you send|could you ship|would you send us|put me down for|sign us up for|reserve|\
reserve for us|book me|I'll take|we'll take|I will take|I'm ordering|we are ordering|I am buying|we are buying|\
order|buy|purchase|please order|please add|add to my order|add to the order|let me have|let us have|\
we are short of|we're running out of|we ran out of|I require|we require|requesting|ordering|looking for|\
we are looking for|I am after|set aside|deliver|please deliver|please prepare|quote and send|we have to buy|\
I have to order|supply us with|kindly send|kindly supply""".split("|")

ORDER = """\
{open}{request} {items}{due}{close}|{open}{request} {items}{due}{close}|{open}{request} {items}{due}{close}|\
{open}{request}: {items}{due}{close}|{open}{request} the following: {items}{due}{close}|\
{open}{request} this: {items}{due}{close}|{open}{front}{request} {items}{close}|\
{open}{front}{request}: {items}{close}|{open}{note}{request} {items}{due}{close}|{open}{items}{due}{close}|\
{open}order: {items}{due}{close}|{open}here is my order: {items}{due}{close}|\
{open}new order, {items}{due}{close}|{open}shopping list: {items}{due}{close}|{open}{front}{items}{close}|\
{open}{request}, if possible, {items}{due}{close}|{open}{request} as soon as you can {items}{due}{close}|\
{open}{request} once more {items}{due}{close}""".split("|")

ITEM = """\
{qu_of} {p}{price}|{qu_of} {p}{price}|{qu_of} {p}{price}|{p}: {qu}{price}|{p}, {qu}{price}|{p} ({qu}{price})|\
{p} ({qu}){price}|{p} x {qu}{price}|{p} - {qu}{price}|{p} = {qu}{price}|{p}, quantity {qu}{price}|\
{p}, {qu} in total{price}|{p} (qty: {qu}){price}|{p}{price}, {qu}|of {p}, {qu}{price}|\
for {p} make it {qu}{price}|quantity {qu}, product {p}{price}|{lead}{qu_of} {p}|some {qu_of} {p}{price}|\
another {qu_of} {p}{price}""".split("|")

PRODUCT = """\
{name}|{name}|{name}|{name}|{name}|{name}|product {name}|the product {name}|item {name}|model {name}|\
the model {name}|reference {name}|ref. {name}|code {name}|part {name}|brand {name}|type {name}|"{name}"|\
'{name}'|“{name}”|*{name}*|[{name}]""".split("|")

PRICE = """\
 at {m}| at {m}| at {m} each| at {m} apiece| at {m} a piece| at {m} per unit| at {m} ea.| at a price of {m}|\
 at the price of {m}| at a rate of {m}|, price {m}|, price: {m}|, unit price {m}|, unit price: {m}|\
, priced at {m}|, with a price of {m}|, cost {m}|, unit cost {m}|, costing {m}|, value {m}|, list price {m}|\
 for {m}| for {m} each| for {m} apiece| per piece {m}| @ {m}| @ {m} each| of {m} each| / {m}| - {m}|\
, paying {m} for each|, you quoted {m}|, we agreed on {m}| which cost {m}| that go for {m}|, each one is {m}|\
, I was told {m}|, catalogue price {m}|, {m} each|, {m} per unit""".split("|")

UNIT = {
    "unit": "units|unit|pieces|pcs|pcs.|pc|ea|items|copies|pieces total",
    "box": "boxes|box|bx|cartons|cases|big boxes",
    "kg": "kilos|kg|kilograms|kgs|kilo|Kg",
    "l": "liters|litres|l|liter|ltr",
    "m": "meters|metres|m|meter|mtrs",
    "bag": "bags|sacks|bag|small bags|pouches",
    "bottle": "bottles|bottle|flasks|jars",
    "roll": "rolls|roll|reels|spools",
    "pack": "packs|pack|packages|packets|bundles",
    "pallet": "pallets|pallet|skids",
}

MONEY = {
    "MXN": "{n} pesos|{n} Mexican pesos|{n} MXN|MXN {n}|MX${n}|{n} mxn",
    "USD": "{n} dollars|{n} dollars|${n}|$ {n}|{n} USD|USD {n}|US${n}|{n} usd|{n} bucks|{n} US dollars|{n}$",
    "EUR": "{n} euros|{n} euros|€{n}|€ {n}|{n}€|EUR {n}|{n} EUR|{n} eur",
    "GBP": "{n} pounds|{n} pounds|£{n}|£ {n}|{n} GBP|GBP {n}|{n} quid|{n} pounds sterling",
    "PEN": "{n} soles|S/{n}|{n} PEN|PEN {n}|{n} Peruvian soles",
}

JOINER = """\
, | and |; |, and | and also |, also | plus | along with | as well as |, then |; also | + |, besides that |\
 and finally |, together with """.split("|")

DUE = """\
 for {day}| by {day}|, by {day}|, delivery {day}|, deliver {day}|. Delivery: {day}|. I need it by {day}|\
, needed {day}| no later than {day}|, no later than {day}|, before {day}| with delivery {day}|, to arrive {day}|\
, arriving {day}| and have it here {day}|, I will collect it {day}|. We come {day} to fetch it|, deadline {day}|\
, it is for {day}|. Urgent for {day}|, if possible {day}|, we expect it {day}|. See you {day}|; date: {day}""".split("|")

FRONT = """\
for {day} |By {day}, |with delivery {day}, |before {day} |no later than {day} |{day} without fail |\
urgent for {day}: |to arrive {day}: |with {day} as the date, |delivery {day}; """.split("|")

DAY = {
    "monday": "Monday|this Monday|next Monday|Mon",
    "tuesday": "Tuesday|this Tuesday|next Tuesday|Tue",
    "wednesday": "Wednesday|this Wednesday|next Wednesday|Wed",
    "thursday": "Thursday|this Thursday|next Thursday|Thu",
    "friday": "Friday|this Friday|next Friday|Fri",
    "saturday": "Saturday|this Saturday|next Saturday|Sat",
    "sunday": "Sunday|this Sunday|next Sunday|Sun",
    "today": "today|later today|this afternoon",
    "tomorrow": "tomorrow|tomorrow morning|early tomorrow",
}

NOTE = """\
like every month, |same as last time, |my customer number is {id}, |order {id}, |as in quote {id}, |\
from purchase order {id}, |for branch {id}, |ticket {id}: |since there is an offer, |on behalf of {person}, |\
{person} asked me to write, |invoice {id} is paid, |we are new customers, |no rush, |as agreed, |\
after talking to {person}, |we sold everything, |thanks in advance, |with an invoice please, |\
for the shop of {person}, """.split("|")

CLOSE = """\
. Thanks|, thanks|. Thank you|, please|. Please|. Regards|. Regards, {person}|. Best|. Best regards|. Cheers|\
. Awaiting your reply|. Let me know|. Thanks in advance|, thanks in advance|. Sincerely, {person}|\
. Yours, {person}|, pls|, thx|. See you|. Have a nice day|. Good day|. Please confirm|. Can you confirm?|\
, is that ok?|. It is urgent|. With invoice|. I pay cash|. I pay by card|. No rush|. The usual|. Many thanks|\
. My phone is {id}|. Customer {id}|. {person}""".split("|")

SEPARATOR = [", ", ", ", ". ", "! ", ": ", " ", "; ", " - "]

# A quantity in a phrase: text, value, what links it to a noun.
PHRASES = [
    ("a dozen", 12, ""), ("half a dozen", 6, ""), ("two dozen", 24, ""), ("three dozen", 36, ""), ("four dozen", 48, ""),
    ("a couple", 2, " of"), ("a hundred", 100, ""), ("a thousand", 1000, ""), ("half a thousand", 500, ""),
    ("a pair", 2, " of"), ("a gross", 144, " of"), ("a score", 20, " of"), ("two thousand", 2000, ""),
    ("five thousand", 5000, ""), ("ten thousand", 10000, ""), ("twelve hundred", 1200, ""), ("fifteen hundred", 1500, ""),
    ("half a hundred", 50, ""), ("ten dozen", 120, ""), ("a hundred and fifty", 150, ""),
]  # fmt: skip
OF = ["of", "of", "of", "of the", "of", "with"]
