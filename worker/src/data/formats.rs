//! The formats of image files.

use anyhow::ensure;
use image::{DynamicImage, ImageFormat};

/// Extensions of the files that are read as images.
pub(super) const FORMATS: [&str; 4] = ["png", "jpg", "jpeg", "webp"];

/// Decodes an image.
///
/// # Errors
/// It is none, is damaged, or is cut off; some decoders fill in what is missing.
pub(super) fn decoded(bytes: &[u8]) -> anyhow::Result<DynamicImage> {
    let whole = match image::guess_format(bytes) {
        Ok(ImageFormat::Jpeg) => jpeg_has_its_end(bytes),
        Ok(ImageFormat::Png) => bytes.windows(4).any(|name| name == b"IEND"),
        Ok(ImageFormat::WebP) => {
            let length = bytes.get(4..8).and_then(|size| size.try_into().ok()).map_or(0, u32::from_le_bytes);
            bytes.len() >= length as usize + 8
        }
        _ => true,
    };
    let image = image::load_from_memory(bytes)?;
    ensure!(whole, "is cut off");
    ensure!(image.height() > 0 && image.width() > 0, "is empty");
    Ok(image)
}

/// Whether a JPEG's mark of the end follows its data (ITU-T T.81, annex B). Previews inside have marks of their own, and programs
/// append what they like.
fn jpeg_has_its_end(bytes: &[u8]) -> bool {
    const START: u8 = 0xd8;
    const END: u8 = 0xd9;
    let mut at = 0;
    loop {
        // In the data of an image no byte but 0 and the marks of a restart follows 0xff.
        let is_mark = |pair: &[u8]| pair[0] == 0xff && !matches!(pair[1], 0 | 0xd0..=0xd7 | 0xff);
        let Some(skipped) = bytes.get(at..).and_then(|rest| rest.windows(2).position(is_mark)) else {
            return false;
        };
        at += skipped + 2;
        match (bytes[at - 1], bytes.get(at..at + 2)) {
            (END, _) => return true,
            (START, _) => {}
            // Each other mark is followed by its length and content.
            (_, Some(length)) => at += usize::from(u16::from_be_bytes([length[0], length[1]])),
            (_, None) => return false,
        }
    }
}

/// Whether a file's name has the extension of an image.
pub(super) fn is_image(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, extension)| FORMATS.contains(&extension.to_lowercase().as_str()))
}
