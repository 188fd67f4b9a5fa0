//! The formats of image files, and of files that are given in their place.

use std::{collections::HashSet, io::Cursor};

use anyhow::{bail, ensure};
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, metadata::Orientation};

/// Extensions of the files that are read as images.
pub(super) const FORMATS: [&str; 4] = ["png", "jpg", "jpeg", "webp"];
/// Extensions of images of other formats, which are broken ones where nothing else is there.
const OTHERS: [&str; 10] = ["gif", "bmp", "tif", "tiff", "heic", "heif", "avif", "jxl", "jp2", "psd"];

/// A kind of file that is not read, by its first bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Foreign {
    Image(&'static str),
    Archive(&'static str),
    Compressed(&'static str),
}

impl Foreign {
    /// The kind of a file that begins so.
    pub(super) fn of(start: &[u8]) -> Option<Self> {
        const MARKS: [(&[u8], Foreign); 15] = [
            (b"GIF87a", Foreign::Image("GIF")),
            (b"GIF89a", Foreign::Image("GIF")),
            (b"II*\0", Foreign::Image("TIFF")),
            (b"MM\0*", Foreign::Image("TIFF")),
            (b"\xff\x0a", Foreign::Image("JPEG XL")),
            (b"\0\0\0\x0cJXL \r\n\x87\n", Foreign::Image("JPEG XL")),
            (b"\0\0\0\x0cjP  \r\n\x87\n", Foreign::Image("JPEG 2000")),
            (b"8BPS", Foreign::Image("Photoshop")),
            (b"PK\x03\x04", Foreign::Archive("zip")),
            (b"PK\x05\x06", Foreign::Archive("zip")),
            (b"Rar!\x1a\x07", Foreign::Archive("RAR")),
            (b"7z\xbc\xaf\x27\x1c", Foreign::Archive("7z")),
            (b"\xfd7zXZ\0", Foreign::Compressed("xz")),
            (b"BZh91AY&SY", Foreign::Compressed("bzip2")),
            (b"\x04\x22\x4d\x18", Foreign::Compressed("lz4")),
        ];
        let marked = MARKS.iter().find(|(mark, _)| start.starts_with(mark)).map(|(_, kind)| *kind);
        // Two letters alone may begin a text: the four bytes behind the size are 0.
        let bitmap = || start.starts_with(b"BM") && start.get(6..10) == Some(&[0u8; 4][..]);
        let heif = || match (start.get(4..8)?, start.get(8..12)?) {
            (b"ftyp", b"avif" | b"avis") => Some(Self::Image("AVIF")),
            (b"ftyp", b"heic" | b"heix" | b"heim" | b"heis" | b"hevc" | b"hevx" | b"mif1" | b"msf1") => {
                Some(Self::Image("HEIC"))
            }
            _ => None,
        };
        marked.or_else(|| bitmap().then_some(Self::Image("BMP"))).or_else(heif)
    }
}

impl std::fmt::Display for Foreign {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Image(kind) => {
                write!(f, "is a {kind} image, which is not read: convert it to PNG, JPEG or WebP")
            }
            Self::Archive(kind) => write!(f, "is a {kind} archive: unpack it, and name what was in it"),
            Self::Compressed(kind) => write!(
                f,
                "is compressed with {kind}, which is not read: unpack it, or compress it with gzip or zstd"
            ),
        }
    }
}

/// Why a file cannot be a set of images, as far as its beginning tells.
pub(super) fn no_set(start: &[u8]) -> Option<String> {
    // A tar begins with a name, which may be like the mark of anything.
    if start.get(257..262) == Some(&b"ustar"[..]) {
        return None;
    }
    let is_read =
        matches!(image::guess_format(start), Ok(ImageFormat::Png | ImageFormat::Jpeg | ImageFormat::WebP));
    let image = || is_read.then(|| "is one image: name the folder of all".to_owned());
    Foreign::of(start).map(|kind| kind.to_string()).or_else(image)
}

/// An image, turned as its EXIF says, as programs show it.
///
/// # Errors
/// It is none, is of another format, is damaged, or needs too much memory.
pub(super) fn upright(bytes: &[u8]) -> anyhow::Result<DynamicImage> {
    let mut decoder = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?.into_decoder()?;
    let mut limits = Limits::default();
    limits.reserve(decoder.total_bytes())?;
    decoder.set_limits(limits)?;
    // EXIF that cannot be read turns nothing.
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut image = DynamicImage::from_decoder(decoder)?;
    image.apply_orientation(orientation);
    Ok(image)
}

/// [`upright`] of a whole file.
///
/// # Errors
/// It is none, is of another format, is damaged, or is cut off; some decoders fill in what is missing.
pub(super) fn decoded(bytes: &[u8]) -> anyhow::Result<DynamicImage> {
    if let Some(kind) = Foreign::of(bytes) {
        bail!("{kind}");
    }
    let whole = match image::guess_format(bytes) {
        Ok(ImageFormat::Jpeg) => jpeg_has_its_end(bytes),
        Ok(ImageFormat::Png) => bytes.windows(4).any(|name| name == b"IEND"),
        Ok(ImageFormat::WebP) => {
            let length = bytes.get(4..8).and_then(|size| size.try_into().ok()).map_or(0, u32::from_le_bytes);
            bytes.len() >= length as usize + 8
        }
        _ => true,
    };
    let image = upright(bytes)?;
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

/// Whether a file's name has the extension of an image, of those that are read or another.
pub(super) fn is_image(name: &str) -> bool {
    is_read(name) || has_extension(name, &OTHERS)
}

fn is_read(name: &str) -> bool {
    has_extension(name, &FORMATS)
}

fn has_extension(name: &str, known: &[&str]) -> bool {
    name.rsplit_once('.').is_some_and(|(_, extension)| known.contains(&extension.to_lowercase().as_str()))
}

/// A name without its extension.
pub(super) fn stem(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(stem, _)| stem)
}

/// Whether a file or a folder above it is hidden, as notebooks, macOS and caches leave them beside images.
pub(super) fn is_hidden(name: &str) -> bool {
    name.split('/').any(|part| part.starts_with('.') || part == "__MACOSX")
}

/// The images among the names of a folder. One of a format that is not read is passed over beside one of the same name that is.
pub(super) fn images(names: &[String]) -> Vec<String> {
    let read: HashSet<&str> = names.iter().filter(|name| is_read(name)).map(|name| stem(name)).collect();
    let is_one = |name: &&String| is_read(name) || (is_image(name) && !read.contains(stem(name)));
    names.iter().filter(is_one).cloned().collect()
}

/// The name of a file as another one in a folder, such as a list, gives it; perhaps on Windows.
pub(super) fn below(folder: &str, file: &str) -> String {
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    for part in file.split(['/', '\\']) {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use potstill_models::weights::Archive;

    use super::*;

    fn bytes(tensor: &tch::Tensor) -> Vec<u8> {
        Vec::try_from(tensor.reshape([-1])).unwrap()
    }

    #[test]
    fn images_of_all_kinds_show_what_pillow_shows() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/pillow.safetensors");
        let fixture = Archive::read(&path).unwrap().tensors;
        let names: Vec<&str> = fixture.keys().filter_map(|name| name.strip_prefix("file.")).collect();
        assert_eq!(names.len(), 13);
        for name in names {
            let image = decoded(&bytes(&fixture[&format!("file.{name}")])).unwrap().into_rgb8();
            let expected = &fixture[&format!("pixels.{name}")];
            let size = [i64::from(image.height()), i64::from(image.width()), 3];
            assert_eq!(size, expected.size()[..], "{name}");
            let levels = image.as_raw().iter().zip(bytes(expected)).map(|(a, b)| a.abs_diff(b)).max();
            // Decoders of JPEG round differently.
            let allowed = if name.ends_with(".jpg") { 4 } else { 0 };
            assert!(levels <= Some(allowed), "{name}: {levels:?}");
        }
    }
}
