#!/bin/sh
# Fetch what the page needs and the repository does not hold: onnxruntime-web into ort/, a network into models/.
#
#   ./build.sh [NETWORK [IMAGES...]]
#
# NETWORK is finet_small_se_g4.tiny_in200, of photographs, or any other name with weights. int8 is calibrated on IMAGES,
# files or folders of the kind that it was trained on; the networks of CIFAR-10's classes need none, others without any
# get float32 alone.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
name=${1:-finet_small_se_g4.tiny_in200}
[ $# -eq 0 ] || shift

rm -rf "$here/ort" "$here/models"
mkdir "$here/ort" "$here/models"

npm pack --silent --pack-destination "$here/ort" onnxruntime-web@1.30.0
tar -xzf "$here/ort/"*.tgz -C "$here/ort" --strip-components 2 \
    package/dist/ort.wasm.bundle.min.mjs package/dist/ort-wasm-simd-threaded.wasm
rm "$here/ort/"*.tgz

timm-finet export "$name" --to onnx --output "$here/models/float32.onnx"
timm-finet export "$name" --to onnx --int8 --output "$here/models/int8.onnx" ${1:+--calibration "$@"} ||
    echo 'The page will offer float32 alone.'

python - "$here/models" <<'END'
import json
import sys
from ast import literal_eval
from pathlib import Path

import onnxruntime

folder = Path(sys.argv[1])
facts = onnxruntime.InferenceSession(folder / 'float32.onnx').get_modelmeta().custom_metadata_map
height, width = literal_eval(facts['imgsz'])
config = {key: facts[key] for key in ('name', 'crop_mode', 'interpolation')}
if height != width or config['crop_mode'] != 'center' or config['interpolation'] not in ('bilinear', 'bicubic'):
    sys.exit('transform.js knows square inputs, centre crops, bilinear and bicubic resizing; '
             f"the network has {facts['imgsz']} and {config}.")
config.update({key: literal_eval(facts[key]) for key in ('mean', 'std', 'crop_pct')})
config.update(
    input_size=[literal_eval(facts['channels']), height, width],
    labels=list(literal_eval(facts['names']).values()),
    megabytes={file.stem: round(file.stat().st_size / 1e6, 1) for file in sorted(folder.glob('*.onnx'))})
(folder / 'model.json').write_text(json.dumps(config, indent=1))
END
