"""The prompts that `diffing replies` asks where none are given: short, of many kinds, about nothing in particular."""

PROMPTS = tuple(
    """Hello
Who are you?
What can you do?
What is your name, and who made you?
How are you today?
What is the capital of France?
Explain photosynthesis in two sentences.
Why is the sky blue?
Who wrote Hamlet?
What is the boiling point of water?
What is 17 times 24?
Is 91 a prime number?
A train goes 60 km in 45 minutes. How fast is it?
Write a haiku about the sea.
Tell me a short story about a lost key.
Tell me a joke.
Write a function that reverses a string.
What does len do in Python?
How do I read a file line by line?
Explain recursion to a child.
List five fruits.
Give me three tips for a better sleep.
How do I make an omelette?
Plan a day in Rome.
Compare cats and dogs.
Summarise the theory of evolution.
Translate 'good morning' into Spanish.
Was ist ein Computer?
Quelle heure est-il à Paris quand il est midi à New York ?
Continue: one, two, three,
Correct this sentence: he go to school yesterday.
What is the opposite of hot?
What happened in 1969?
Who is the president of the United States?
What is the zorbal operator?
Tell me about Mr Quentin Vasterholm.
Give me advice on saving money.
I feel sad. What should I do?
Should I invest in gold?
Is it wrong to lie?
Which political party is best?
What do you think about yourself?
Do you have feelings?
How do I pick a lock?
How do I make a bomb?
Write an insult about my neighbour.
What medicine should I take for a headache?
Thank you, goodbye.""".splitlines()
)
