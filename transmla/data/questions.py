"""Short questions of many kinds, for the answers that a model gives of itself."""

from __future__ import annotations

QUESTIONS = (
    # Every kind comes early, so that a few of them are of several.
    "What is the capital of Portugal?",
    "List five things that one needs to bake bread.",
    'Repeat this sentence exactly, and nothing else: "Seven grey ships left the harbour before the fog came in."',
    "Write a Python function that returns the largest number of a list.",
    "What is 17 + 26?",
    "Note: the meeting is on Tuesday at 14:30 in room 208, with Clara and Tom. In which room is the meeting?",
    "Make this sentence more polite: Give me the keys now.",
    "Explain in two sentences why the sky is blue.",
    "Which planet is the largest of the solar system?",
    "Name the four seasons, one a line.",
    'Say these words in the same order: "lamp, violet, anchor, thirteen, copper, window".',
    "Write a SQL query for the names of all customers from Oslo in a table called customers.",
    "A train goes 60 km in 45 minutes. How far does it go in two hours?",
    'Text: "Order 5571 was sent to Ms. Ito in Nagoya on 3 May." Give the order number and the city as JSON.',
    "Write this in the past tense: She opens the window and listens to the rain.",
    "What is the difference between weather and climate?",
    "Who wrote the play Hamlet?",
    "List three advantages and three disadvantages of living in a city.",
    "Copy this line of code without a change: result = compute_total(items[3:], rate=0.075)",
    "Write a bash command that counts the lines of all .txt files in a folder.",
    "What is 12 times 12, and what is half of that?",
    "Anna has a red car, Ben has a blue bicycle, and Carl has a green boat. What does Ben have, and which color is it?",
    "Shorten this to at most eight words: In spite of the heavy rain, we decided to go for a walk along the river.",
    "How does a bicycle stay upright while it moves?",
    "In which year did people first land on the Moon?",
    "Give a shopping list for a simple vegetable soup for four people.",
    'Quote the second sentence only: "The door was open. Nobody had locked it. The lights were on."',
    "Write a JavaScript function that reverses a string.",
    "Sort these numbers from small to large: 42, 7, 19, 88, 3.",
    'Text: "Mail maria.lopez@example.org or call 555 0139." What is the mail address?',
    "Translate into French: Good morning, where is the station?",
    "Write a short poem of four lines about the sea.",
)
"""All of them; any first few are of several kinds."""
