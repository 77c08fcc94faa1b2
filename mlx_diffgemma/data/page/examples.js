// What the page offers to try: what the model that ships with us can do, and what a real one can.

// Not one clue to spare: the canvas takes seven steps.
const SUDOKU = "..5..2\n.3.6..\n.5....\n..4.3.\n1.....\n...2..";

const SMALL = {
  chat: [
    ["Say hello", "hello"],
    ["Ask for a capital", "What is the capital of Norway?"],
    ["Make a record of a line", "Record: Bartholomew Featherstone from Liechtenstein, born 1984-03-12"],
    ["Correct a spelling", "Fix: we only use Spanise at home"],
  ],
  fill: [
    ["A choice", "The capital of Norway is {{city:Oslo|Rome|Paris}}.", "What is the capital of Norway?"],
    ["A record", '{"item":"pears","count":12,"price":{{price:int}},"to":"Anna"}', "Record: 12 pears at 345 to Anna"],
  ],
  edit: [["A typo", "a small hosue near the river", "Fix", null]],
};

const PUZZLES = { ...SMALL, chat: [["Solve a Sudoku", SUDOKU]] };

const REAL = {
  chat: [
    ["Explain", "Explain to a ten-year-old why the sky is blue."],
    ["Write code", "Write a Python function that merges two sorted lists, and a test for it."],
    ["Plan", "Plan a vegetarian dinner for six, as a table with the time each dish takes."],
    ["Write a poem", "Write a haiku about noise that turns into words."],
  ],
  fill: [
    ["A letter", "Dear {{name}},\n\nthank you for {{}}. We meet on {{day:Monday|Tuesday|Friday}} at {{hour:int}} o'clock.\n\nYours, Kim", "A short letter to a colleague who helped with a talk."],
    ["Code", "def median(values):\n    {{}}\n    return {{result}}\n", "A Python function."],
  ],
  edit: [["A paragraph", "The meeting was attended by alot of people. It were long, and nobody didn't took notes.", "Correct the grammar", null]],
};

export function examplesFor(model) {
  return model === "tiny" ? SMALL : model === "tiny-puzzles" ? PUZZLES : REAL;
}
