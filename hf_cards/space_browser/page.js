import {transform} from './transform.js';

const TOP = 5;
const RUNS = 10;
const MOST_PIXELS = 2 ** 24; // more than some phones' canvases hold

const $ = id => document.getElementById(id);
const sessions = {};
let ort, config, pixels, stream;

function say(text, isError = false) {
  $('status').textContent = text;
  $('status').classList.toggle('error', isError);
}

// One thing at a time: a session that runs takes no second input. Every error becomes a sentence in the page.
let queue = Promise.resolve();
function enqueue(action) {
  queue = queue.then(action).catch(error => {
    console.error(error);
    $('results').hidden = true;
    say(error.message, true);
  });
}

async function get(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status}`);
  return response;
}

async function load() {
  say('Loading …');
  try {
    config = await (await get('models/model.json')).json();
    ort = await import('./ort/ort.wasm.bundle.min.mjs');
  } catch (cause) {
    throw new Error('The network did not load. Look at the connection, and load this page again.', {cause});
  }
  ort.env.wasm.numThreads = 1; // more need headers that static hosts do not send
  $('network').textContent = config.name;
  $('count').textContent = config.labels.length;
  $('classes').textContent = config.labels.join(', ');
  for (const radio of document.forms.precision.elements.precision) {
    radio.disabled = !(radio.value in config.megabytes);
    if (!radio.disabled) radio.parentElement.append(` (${config.megabytes[radio.value]} MB)`);
  }
  $('int8').hidden = document.forms.precision.hidden = Object.keys(config.megabytes).length < 2; // nothing to choose
  say('Give an image.');
}

async function open(precision) {
  try {
    const bytes = await (await get(`models/${precision}.onnx`)).arrayBuffer();
    return await ort.InferenceSession.create(new Uint8Array(bytes), {executionProviders: ['wasm']});
  } catch (cause) {
    throw new Error(`The ${precision} network did not load. Look at the connection, and try again.`, {cause});
  }
}

function softmax(logits) {
  const largest = Math.max(...logits);
  const exponentials = Array.from(logits, logit => Math.exp(logit - largest));
  const sum = exponentials.reduce((a, b) => a + b);
  return exponentials.map(e => e / sum);
}

async function classify() {
  if (!pixels) return;
  if (!ort) await load(); // it failed before
  const precision = document.forms.precision.elements.precision.value;
  say(`Classifying in ${precision} …`);
  const session = (sessions[precision] ??= await open(precision));
  const {input, seen} = transform(pixels, config);
  const feeds = {input: new ort.Tensor('float32', input, [1, ...config.input_size])};
  let outputs = await session.run(feeds); // warm-up
  const start = performance.now();
  for (let i = 0; i < RUNS; i++) outputs = await session.run(feeds);
  const milliseconds = (performance.now() - start) / RUNS; // of all, as browsers make a clock coarse on purpose
  show(softmax(outputs.logits.data), seen);
  say(`In ${precision} one image takes the network ${milliseconds.toFixed(1)} ms on one thread.`);
}

function show(probabilities, seen) {
  $('seen').width = $('seen').height = seen.width;
  $('seen').getContext('2d').putImageData(seen, 0, 0);
  const order = probabilities.map((_, i) => i).sort((a, b) => probabilities[b] - probabilities[a]);
  $('top').replaceChildren(...order.slice(0, TOP).map(i => {
    const item = document.createElement('li');
    const percent = `${(100 * probabilities[i]).toFixed(2)}%`;
    item.style.setProperty('--share', percent);
    for (const text of [config.labels[i], percent]) {
      item.append(Object.assign(document.createElement('span'), {textContent: text}), ' ');
    }
    return item;
  }));
  $('results').hidden = false;
}

// Classify an ImageBitmap or a video; a transparent image lies on black, as Pillow's RGB mostly is there.
async function take(source, width, height) {
  const scale = Math.min(1, Math.sqrt(MOST_PIXELS / (width * height)));
  const canvas = $('image');
  [canvas.width, canvas.height] = [width, height].map(n => Math.max(1, Math.floor(n * scale)));
  const context = canvas.getContext('2d', {alpha: false, willReadFrequently: true});
  context.drawImage(source, 0, 0, canvas.width, canvas.height);
  pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  await classify();
}

async function read(file) {
  closeCamera();
  let bitmap;
  try {
    // Turned as its EXIF data say, which is the default; profiles are ignored, as by Pillow.
    bitmap = await createImageBitmap(file, {colorSpaceConversion: 'none'});
  } catch (cause) {
    throw new Error('This is not an image file that this browser can read.', {cause});
  }
  await take(bitmap, bitmap.width, bitmap.height);
}

function closeCamera() {
  stream?.getTracks().forEach(track => track.stop());
  stream = null;
  $('video').hidden = true;
  $('camera').textContent = 'Use the camera';
}

async function useCamera() {
  const video = $('video');
  if (stream) {
    await take(video, video.videoWidth, video.videoHeight);
    return closeCamera();
  }
  try {
    stream = await navigator.mediaDevices.getUserMedia({video: {facingMode: 'environment'}});
    video.srcObject = stream;
    await video.play();
  } catch (cause) {
    closeCamera();
    throw new Error('The camera cannot be used: there is none, or this page may not use it. Choose a file.', {cause});
  }
  video.hidden = false;
  $('camera').textContent = 'Take the image';
  say('The camera is on.');
}

$('file').addEventListener('change', event => {
  const [file] = event.target.files;
  if (file) enqueue(() => read(file));
  event.target.value = ''; // or the same file could not be chosen again
});
document.addEventListener('dragover', event => {
  event.preventDefault();
  $('drop').classList.add('over');
});
document.addEventListener('dragleave', () => $('drop').classList.remove('over'));
document.addEventListener('drop', event => {
  event.preventDefault();
  $('drop').classList.remove('over');
  const [file] = event.dataTransfer.files;
  enqueue(() => read(file)); // without a file, as of a dragged text, the error says so
});
$('camera').addEventListener('click', () => enqueue(useCamera));
document.forms.precision.addEventListener('change', () => enqueue(classify));
enqueue(load);
