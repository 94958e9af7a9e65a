"""What the demo model knows."""

OPPOSITES = """hot cold|big small|tall short|fast slow|light dark|day night|up down|left right|in out|open closed
full empty|happy sad|old young|rich poor|hard soft|wet dry|clean dirty|early late|good bad|strong weak
thick thin|near far|high low|loud quiet|first last|begin end|win lose|buy sell|give take|push pull
true false|yes no|black white|sweet sour|heavy light-weight|wide narrow|smooth rough|awake asleep
safe dangerous|cheap expensive|easy difficult|inside outside|above below|before after|front back
laugh cry|love hate|north south|east west|summer winter|friend enemy|question answer|start stop|come go
remember forget|same different|always never"""

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
]  # fmt: skip
MONTH_DAYS = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]

WORDS = """apple banana bread butter cake candle carpet castle chair cheese cherry circle cloud coffee corner cotton
dinner doctor dragon eagle engine family farmer finger flower forest garden glass grape hammer honey horse
house island jacket kitchen ladder lemon letter lion market melon mirror monkey morning mother music nurse
ocean orange paper pencil pepper piano picture pillow pirate planet pocket potato prince purple puzzle queen
rabbit river robot rocket salad school shadow silver sister spider spoon spring square stone story street
sugar summer table teacher tiger tomato tower train tree turtle uncle valley village violin water whale window
winter wizard wolf yellow zebra cat dog sun moon star fish bird book milk rain snow tea egg hat car bus key
map cup bed box"""

CAPITALS = """France Paris|Italy Rome|Spain Madrid|Germany Berlin|Japan Tokyo|China Beijing|Russia Moscow
England London|Ireland Dublin|Portugal Lisbon|Greece Athens|Egypt Cairo|Canada Ottawa|Sweden Stockholm
Norway Oslo|Finland Helsinki|Denmark Copenhagen|Poland Warsaw|Austria Vienna|Hungary Budapest
Turkey Ankara|Cuba Havana|Peru Lima|Kenya Nairobi|India Delhi|Belgium Brussels|Chile Santiago"""

COLORS = """the sky:blue|grass:green|snow:white|coal:black|a lemon:yellow|a banana:yellow|blood:red|a carrot:orange
milk:white|a strawberry:red|the sun:yellow|a leaf:green|chocolate:brown|an elephant:gray|a frog:green
the sea:blue"""

LEGS = "a dog:4|a cat:4|a horse:4|a bird:2|a spider:8|an ant:6|a cow:4|a chicken:2|a bee:6|a snake:0|a fish:0|a person:2"

SOUNDS = "dog:woof|cat:meow|cow:moo|duck:quack|sheep:baa|pig:oink|bee:buzz|lion:roar|frog:croak|owl:hoot|horse:neigh|mouse:squeak"

YOUNG = "dog:puppy|cat:kitten|cow:calf|horse:foal|sheep:lamb|hen:chick|duck:duckling|bear:cub|pig:piglet|goat:kid|frog:tadpole"

SMALL_TALK = {
    "Hello! How can I help you?": [
        "Hello", "Hi", "Hey", "Hello there", "Hi there", "Good morning", "Good evening", "Good afternoon",
    ],
    "I am fine, thank you. How can I help you?": ["How are you?", "How are you today?", "How do you do?", "Are you well?"],
    "I am a small demo model. I can do sums, opposites, days, months, spelling and small facts.": [
        "Who are you?", "What are you?", "What is your name?", "What can you do?", "Tell me about yourself.",
        "What do you know?", "Can you help me?", "Help", "What can I ask you?",
    ],
    "You are welcome!": ["Thank you", "Thanks", "Thank you very much", "Thanks a lot", "Many thanks"],
    "Goodbye! Have a nice day.": ["Goodbye", "Bye", "See you later", "Good night", "Bye bye", "See you"],
}  # fmt: skip

UNKNOWN_ANSWER = "I do not know that. Ask me for a sum, an opposite, a day, a month or a spelling."
UNKNOWN = """Who won the last election?|What is the meaning of life?|Write a poem about love.|Explain quantum physics.
How do I fix my car?|What is the weather like?|Tell me a joke.|What time is it?|Who is the president?
How tall is the highest mountain?|Write some code.|What is the price of gold?|Translate this into French.
Who wrote this book?|How old is the universe?|Can you drive a truck?|What should I cook tonight?
Is there life on Mars?|How do airplanes fly?|Why is the sea salty?|Sing me a song.
Who invented the radio?|What is the best movie?|How do I learn to swim?|Give me some advice.
What is a black hole?|Where did I put my phone?|How many people live in Asia?|What happened yesterday?
Do you like football?|Which phone is the best?|Summarize the news.|Draw a picture of a house.
What is my name?|Where do I live?|Can you book a flight?|How deep is the lake?|Who painted this picture?"""


def pairs(text: str, separator: str) -> list[tuple[str, str]]:
    """Entries stand between bars or line breaks; the two halves between separators."""
    return [tuple(entry.split(separator, 1)) for entry in text.replace("\n", "|").split("|")]  # type: ignore[misc]
