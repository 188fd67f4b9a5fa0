//! Pictures of samples: a grid of tiles as PNG.

use std::io::Cursor;

use anyhow::Context;
use image::{GrayImage, ImageFormat, Luma, Rgb, RgbImage};
use tch::{Kind, Tensor};

/// Pixels between tiles, and around the picture.
const GAP: u32 = 4;
/// Pixels between blocks of rows: teacher above, student below.
const BLOCK_GAP: u32 = 24;
/// Small images are enlarged by an integer factor until a tile has at least this width in pixels.
const TILE: u32 = 56;
const BACKGROUND: u8 = 255;

/// A picture of blocks of images, one below the other, each [N, C, H, W] in [−1, 1] with C = 1 or 3, `columns` in a
/// row. Returns PNG bytes.
///
/// # Errors
/// Images of another number of channels; the encoder's.
pub fn grid(blocks: &[&Tensor], columns: u32) -> anyhow::Result<Vec<u8>> {
    let [_, channels, height, width] = blocks.first().context("no images")?.size()[..] else {
        anyhow::bail!("images must be [N, C, H, W]");
    };
    let (height, width) = (height as u32, width as u32);
    let factor = TILE.div_ceil(width).max(1);
    let (tile_width, tile_height) = (width * factor, height * factor);
    let rows = |block: &Tensor| (block.size()[0] as u32).div_ceil(columns);
    let total_rows: u32 = blocks.iter().map(|block| rows(block)).sum();
    let total_width = columns * (tile_width + GAP) + GAP;
    let total_height = total_rows * (tile_height + GAP) + GAP + (blocks.len() as u32 - 1) * BLOCK_GAP;
    let mut canvas = RgbImage::from_pixel(total_width, total_height, Rgb([BACKGROUND; 3]));

    let mut top = GAP;
    for block in blocks {
        let values = bytes(block)?;
        for (index, image) in values.chunks((height * width) as usize * channels as usize).enumerate() {
            let left = GAP + (index as u32 % columns) * (tile_width + GAP);
            let above = top + (index as u32 / columns) * (tile_height + GAP);
            let tile = tile(image, channels, height, width, factor)?;
            image::imageops::replace(&mut canvas, &tile, left.into(), above.into());
        }
        top += rows(block) * (tile_height + GAP) + BLOCK_GAP;
    }
    encode(canvas, channels == 1)
}

/// One image [1, C, H, W] in its own size. Returns PNG bytes.
///
/// # Errors
/// As [`grid`].
pub fn single(image: &Tensor) -> anyhow::Result<Vec<u8>> {
    let [_, channels, height, width] = image.size()[..] else {
        anyhow::bail!("an image must be [1, C, H, W]");
    };
    let values = bytes(image)?;
    let canvas = tile(&values, channels, height as u32, width as u32, 1)?;
    encode(canvas, channels == 1)
}

/// Values in [−1, 1] as bytes, row by row and channel by channel.
fn bytes(images: &Tensor) -> anyhow::Result<Vec<u8>> {
    let values = ((images + 1.0) * 127.5).round().clamp(0.0, 255.0).to_kind(Kind::Uint8).contiguous();
    Ok(Vec::try_from(values.reshape([-1]))?)
}

/// One image, enlarged by an integer factor.
fn tile(values: &[u8], channels: i64, height: u32, width: u32, factor: u32) -> anyhow::Result<RgbImage> {
    anyhow::ensure!(channels == 1 || channels == 3, "cannot draw images of {channels} channels");
    let plane = (height * width) as usize;
    Ok(RgbImage::from_fn(width * factor, height * factor, |x, y| {
        let at = ((y / factor) * width + x / factor) as usize;
        match channels {
            1 => Rgb([values[at]; 3]),
            _ => Rgb([values[at], values[plane + at], values[2 * plane + at]]),
        }
    }))
}

fn encode(canvas: RgbImage, grey: bool) -> anyhow::Result<Vec<u8>> {
    let mut png = Cursor::new(Vec::new());
    if grey {
        let canvas =
            GrayImage::from_fn(canvas.width(), canvas.height(), |x, y| Luma([canvas.get_pixel(x, y)[0]]));
        canvas.write_to(&mut png, ImageFormat::Png)?;
    } else {
        canvas.write_to(&mut png, ImageFormat::Png)?;
    }
    Ok(png.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grid_has_its_tiles_where_they_belong() {
        let dark = Tensor::full([3, 1, 8, 8], -1.0, (Kind::Float, tch::Device::Cpu));
        let bright = Tensor::full([2, 1, 8, 8], 0.0, (Kind::Float, tch::Device::Cpu));
        let png = grid(&[&dark, &bright], 2).unwrap();
        let picture = image::load_from_memory(&png).unwrap().to_luma8();
        assert_eq!(picture.dimensions(), (2 * 60 + 4, 3 * 60 + 4 + 24));
        assert_eq!(picture.get_pixel(10, 10)[0], 0);
        assert_eq!(picture.get_pixel(70, 70)[0], BACKGROUND, "the fourth tile of the first block is empty");
        assert_eq!(picture.get_pixel(10, 2 * 60 + 4 + 24 + 5)[0], 128);
        assert!(grid(&[&Tensor::zeros([1, 2, 8, 8], (Kind::Float, tch::Device::Cpu))], 1).is_err());
    }
}
